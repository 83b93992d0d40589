"""Weights into stand-ins for vLLM servers of two ranks, from two stages, in both ways that vLLM takes them."""

from launch import distributed_checks

test_our_extension = distributed_checks("ranks_weights_vllm.py", 2, ("2", "2", "2", "extension"))
test_vllms_own_calls_cuda_ipc = distributed_checks("ranks_weights_vllm.py", 2, ("2", "2", "2", "ipc"))
test_vllms_own_calls_nccl = distributed_checks("ranks_weights_vllm.py", 2, ("2", "2", "2", "nccl"))
