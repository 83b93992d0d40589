"""Weights in and out of Megatron in every layout. One start of gloo ranks per layout."""

from launch import distributed_checks

test_tp1_pp1 = distributed_checks("ranks_weights.py", 1, ("1", "1", "0", "1", "1"))
test_tp2_pp2 = distributed_checks("ranks_weights.py", 4, ("2", "2", "0", "1", "1"))
test_pp2_vpp2 = distributed_checks("ranks_weights.py", 2, ("1", "2", "2", "1", "1"))
test_tp2_dp2_ep2 = distributed_checks("ranks_weights.py", 4, ("2", "1", "0", "2", "1"))
test_pp2_cp2 = distributed_checks("ranks_weights.py", 4, ("1", "2", "0", "1", "2"))
