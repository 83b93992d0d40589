"""Llama 3, 3.1 and 3.2 (text)."""

from megatron_nft.policy.families.parameters import ATTENTION, DENSE_MLP
from megatron_nft.policy.families.record import Family

LLAMA = Family(name="llama", attention_bias=False, qk_norm=False, layer=ATTENTION + DENSE_MLP)
