"""Qwen3, dense: queries and keys are normalized per head."""

from megatron_nft.policy.families.parameters import ATTENTION, DENSE_MLP, QK_NORM
from megatron_nft.policy.families.record import Family

QWEN3 = Family(name="qwen3", attention_bias=False, qk_norm=True, layer=ATTENTION + QK_NORM + DENSE_MLP)
