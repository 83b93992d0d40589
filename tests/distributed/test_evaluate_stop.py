"""A stop signal in the evaluation of a run, on two ranks."""

from launch import distributed_checks

test_evaluate_stop = distributed_checks("ranks_evaluate.py", world_size=2)
