"""The public losses and advantages: pure functions of 1-D tensors, per token, not reduced.

They keep these names; each is defined beside its algorithm in `megatron_nft.algorithms`.
"""

from megatron_nft.algorithms.cispo import cispo_loss
from megatron_nft.algorithms.gspo import gspo_loss
from megatron_nft.algorithms.nft import nft_loss, nft_sequence_loss
from megatron_nft.algorithms.policy_gradient import advantages, policy_gradient_loss
from megatron_nft.algorithms.rft import rft_loss

__all__ = [
    "advantages",
    "cispo_loss",
    "gspo_loss",
    "nft_loss",
    "nft_sequence_loss",
    "policy_gradient_loss",
    "rft_loss",
]
