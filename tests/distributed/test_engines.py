from launch import distributed_checks

test_engines = distributed_checks("ranks_engines.py", world_size=2)
