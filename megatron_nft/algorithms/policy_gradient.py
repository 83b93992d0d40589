"""The clipped policy gradient of GRPO, Dr. GRPO and DAPO, and their advantages."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

ADVANTAGES = ("grpo", "dr_grpo", "dapo")


def policy_gradient_loss(
    logprobs: Tensor,  # [T] with gradient
    behaviour_logprobs: Tensor,  # [T]
    advantage: Tensor,  # [T]
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio_max_log: float = 10.0,
) -> Tensor:
    """Per-token loss [T]: -min(R A, clip(R, 1 - clip_low, 1 + clip_high) A), R = exp(min(log ratio, ratio_max_log)).

    Nothing is reduced; the three algorithms differ in `advantages`, clip_high and the denominator. Computed in the
    dtype of `logprobs`, at least float32. ValueError for shapes that differ or a clip range that is none.
    """
    if logprobs.dim() != 1 or behaviour_logprobs.shape != logprobs.shape or advantage.shape != logprobs.shape:
        raise ValueError(
            "all tensors must be 1-D and of one length, but: "
            f"logprobs {tuple(logprobs.shape)}, behaviour_logprobs {tuple(behaviour_logprobs.shape)}, "
            f"advantage {tuple(advantage.shape)}"
        )
    if not (clip_low > 0 and clip_high > 0):
        raise ValueError(f"clip_low={clip_low}, clip_high={clip_high}: both must be above 0")
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    advantage = advantage.to(dtype)
    ratio = (logprobs.to(dtype) - behaviour_logprobs.detach().to(dtype)).clamp(max=ratio_max_log).exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def advantages(rewards: np.ndarray, kind: str) -> np.ndarray:
    """Advantages of one question's answers, float64 [K], from their rewards [K].

    dr_grpo      A = reward - mean
    grpo, dapo   A = (reward - mean) / std, with the population standard deviation; 0 where all rewards are equal

        advantages(np.array([1, 0, 0, 0]), "dr_grpo")  # [.75, -.25, -.25, -.25]
        advantages(np.array([1, 0, 0, 0]), "grpo")     # [1.7321, -.5774, -.5774, -.5774]
    """
    if kind not in ADVANTAGES:
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(ADVANTAGES)}")
    rewards = np.asarray(rewards, dtype=np.float64)
    centred = rewards - rewards.mean()
    if kind == "dr_grpo":
        return centred
    std = rewards.std()
    # Rewards that are equal up to rounding must not be blown up to unit variance.
    return centred / std if std > 1e-6 else np.zeros_like(centred)
