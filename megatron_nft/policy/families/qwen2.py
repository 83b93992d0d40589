"""Qwen2 and Qwen2.5: a bias on queries, keys and values."""

from megatron_nft.policy.families.parameters import ATTENTION, DENSE_MLP, QKV_BIAS
from megatron_nft.policy.families.record import Family

QWEN2 = Family(name="qwen2", attention_bias=True, qk_norm=False, layer=ATTENTION + QKV_BIAS + DENSE_MLP)
