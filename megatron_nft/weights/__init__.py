"""Weights on their way between HF folders, Megatron shards and running engines."""
