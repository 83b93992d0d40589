"""Samples between ranks, in every kind of layout that four ranks allow."""

from launch import distributed_checks

test_replicas = distributed_checks("ranks_replicas.py", world_size=4)
