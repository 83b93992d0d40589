"""The planner's memory against four real ranks; checks are in ranks_plan.py."""

from launch import distributed_checks

test_plan = distributed_checks("ranks_plan.py", world_size=4)
