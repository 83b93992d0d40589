"""Weights on their way between HF folders, Megatron shards and running engines."""

from megatron_nft import policy as policy  # before megatron-core: it chooses the cuDNN of Transformer Engine
