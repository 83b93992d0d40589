"""What ranks tell each other while they generate, on three ranks."""

from launch import distributed_checks

test_rounds = distributed_checks("ranks_rounds.py", world_size=3)
