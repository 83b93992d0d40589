"""Weights into engines with TP > 1: gloo peers that slice as SGLang does. Three engines, so that one may be lost."""

from launch import distributed_checks

test_two_leaders_engine_tp2 = distributed_checks("ranks_weights_peer.py", 4, ("2", "2", "3", "2"))
test_engine_tp4_repeats_key_value_heads = distributed_checks("ranks_weights_peer.py", 2, ("1", "2", "2", "4"))
