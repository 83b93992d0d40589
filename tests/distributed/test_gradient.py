"""One gradient in every layout, packing and split."""

from launch import distributed_checks

test_one_gradient = distributed_checks("ranks_gradient.py", world_size=4)
