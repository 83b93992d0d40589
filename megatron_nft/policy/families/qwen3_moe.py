"""Qwen3 with a mixture of experts in every layer."""

from megatron_nft.policy.families.parameters import ATTENTION, EXPERT_MLP, QK_NORM
from megatron_nft.policy.families.record import ExpertKeys, Family

QWEN3_MOE = Family(
    name="qwen3_moe",
    attention_bias=False,
    qk_norm=True,
    layer=ATTENTION + QK_NORM + EXPERT_MLP,
    experts=ExpertKeys(
        num_experts=("num_experts", "num_local_experts"),
        ffn_hidden_size="moe_intermediate_size",
        experts_per_token="num_experts_per_tok",
        normalize_weights="norm_topk_prob",
    ),
)
