"""RFT, rejection fine-tuning: NFT's positive term alone, on the correct answers, all questions weighted alike.

    loss_t = c * (-log R_t)

(arXiv 2505.18116, version 3, appendix C: the negative term zeroed, omega = 1.) With another omega it is NFT without
its negative term, an ablation: with omega = 1 - r its expected gradient is 1 - r times that of NFT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from megatron_nft.algorithms.nft import Likelihood, LikelihoodSettings, nft_loss

if TYPE_CHECKING:
    from torch import Tensor


def rft_loss(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    correct: Tensor,
    correct_rate: Tensor,
    *,
    prompt_weight: str = "uniform",
    ratio_max_log: float = 10.0,
) -> Tensor:
    """Per-token rejection fine-tuning loss [T]: NFT without its negative term. Arguments as in `nft_loss`."""
    return nft_loss(
        logprobs,
        behaviour_logprobs,
        correct,
        correct_rate,
        negative_weight=0.0,
        prompt_weight=prompt_weight,
        ratio_max_log=ratio_max_log,
    )


class RFTSettings(LikelihoodSettings):
    """RFT: likelihood of the correct answers."""

    name: str = "rft"
    prompt_weight: Literal["uniform", "dr_grpo", "grpo"] = "uniform"
    """omega(q): 1, 1 - r, or sqrt((1 - r) / r). The paper's RFT has 1."""


class RFT(Likelihood):
    """Rejection fine-tuning."""

    Settings = RFTSettings
    settings: RFTSettings
    negative_weight = 0.0
