"""RFT, rejection fine-tuning: NFT's positive term alone, on the correct answers (appendix C of arXiv 2505.18116)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_nft.algorithms.nft import Likelihood, LikelihoodSettings, nft_loss

if TYPE_CHECKING:
    from torch import Tensor


def rft_loss(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    correct: Tensor,
    correct_rate: Tensor,
    *,
    prompt_weight: str = "dr_grpo",
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
    """RFT: likelihood of the correct answers. The paper's has prompt_weight=uniform."""

    name: str = "rft"


class RFT(Likelihood):
    """Rejection fine-tuning."""

    Settings = RFTSettings
    settings: RFTSettings
    negative_weight = 0.0
