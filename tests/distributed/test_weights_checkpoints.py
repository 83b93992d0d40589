"""Checkpoints that the tools write, loaded by Megatron-Core on two gloo ranks."""

from launch import distributed_checks

test_checkpoints = distributed_checks("ranks_weights_checkpoint.py", 2)
