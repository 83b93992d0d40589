from launch import distributed_checks

test_rollout = distributed_checks("ranks_rollout.py", world_size=2)
