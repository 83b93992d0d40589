"""Megatron's part of a checkpoint: exact resume, resharding, safety."""

from launch import distributed_checks

test_checkpoint = distributed_checks("ranks_checkpoint.py", world_size=4)
