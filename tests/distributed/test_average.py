"""The moving average of the weights, in every kind of layout that four ranks allow."""

from launch import distributed_checks

test_average = distributed_checks("ranks_average.py", world_size=4)
