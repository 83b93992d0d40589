"""One gradient in every layout, packing and split."""

from launch import distributed_checks

test_one_gradient = distributed_checks("ranks_gradient.py", world_size=4)
test_one_gradient_under_context_parallelism = distributed_checks("ranks_context.py", world_size=4)
test_one_gradient_of_losses_per_answer = distributed_checks("ranks_answers.py", world_size=4)
