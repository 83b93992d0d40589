"""The model families that can be trained: one record in one file each, and one line each in `FAMILIES`.

Imports no torch: `plan` and the checks before a start read it too.
"""

from megatron_nft.policy.families.llama import LLAMA
from megatron_nft.policy.families.qwen2 import QWEN2
from megatron_nft.policy.families.qwen3 import QWEN3
from megatron_nft.policy.families.qwen3_moe import QWEN3_MOE
from megatron_nft.policy.families.record import Family as Family

FAMILIES: dict[str, Family] = {
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "llama": LLAMA,
    "qwen3_moe": QWEN3_MOE,
}
"""`model_type` in config.json -> the family's record."""
