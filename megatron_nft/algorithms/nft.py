"""NFT and its special case RFT (arXiv 2505.18116), as pure functions of tensors.

R_t is the ratio of the trained policy to the behaviour policy, r the group's correct rate, c the verdict (0 or 1):

    loss_t = omega(r) * [ c * (-log R_t) + w * (1 - c) * (-log max_v((1 - r R_t) / (1 - r), eps)) ]

max_v clamps the value and keeps the gradient of its argument (straight-through). Nothing is reduced: the caller masks,
sums and divides.
"""

from __future__ import annotations

import torch
from torch import Tensor

PROMPT_WEIGHTS = ("uniform", "dr_grpo", "grpo")


def nft_loss(
    logprobs: Tensor,  # [T] log pi_theta of each token, with gradient
    behaviour_logprobs: Tensor,  # [T] log pi of the policy that generated the data
    correct: Tensor,  # [T] 0 or 1
    correct_rate: Tensor,  # [T] r of the question, in (0, 1), used as given
    *,
    negative_weight: float = 1.0,
    clamp: float = 1.0,
    prompt_weight: str = "dr_grpo",
    ratio_max_log: float = 10.0,
) -> Tensor:
    """Per-token NFT loss [T], one ratio per token.

    negative_weight  w; 0 is RFT
    clamp            eps, above 0; with eps <= 1 the on-policy gradient is Dr. GRPO's (`dr_grpo`) or GRPO's (`grpo`)
    prompt_weight    omega: `uniform` 1, `dr_grpo` 1 - r, `grpo` sqrt((1 - r) / r)
    ratio_max_log    upper bound of log R before exp; beyond it a token has no gradient

    Computed in the dtype of `logprobs`, at least float32. ValueError for shapes that differ, a rate outside (0, 1),
    and options out of range.
    """
    log_ratio, correct, rate = _prepare(logprobs, behaviour_logprobs, correct, correct_rate)
    return _nft_terms(log_ratio, correct, rate, negative_weight, clamp, prompt_weight, ratio_max_log)


def rft_loss(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    correct: Tensor,
    correct_rate: Tensor,
    *,
    prompt_weight: str = "dr_grpo",
    ratio_max_log: float = 10.0,
) -> Tensor:
    """Per-token rejection fine-tuning loss [T]: NFT without its negative term."""
    return nft_loss(
        logprobs,
        behaviour_logprobs,
        correct,
        correct_rate,
        negative_weight=0.0,
        prompt_weight=prompt_weight,
        ratio_max_log=ratio_max_log,
    )


def nft_sequence_loss(
    logprobs: Tensor,  # [T]
    behaviour_logprobs: Tensor,  # [T]
    correct: Tensor,  # [T], one value per segment
    correct_rate: Tensor,  # [T], one value per segment
    loss_mask: Tensor,  # [T], 1 on response tokens
    segment_ids: Tensor,  # int64 [T], 0 .. S-1
    *,
    negative_weight: float = 1.0,
    clamp: float = 1.0,
    prompt_weight: str = "dr_grpo",
    ratio_max_log: float = 10.0,
) -> Tensor:
    """NFT with one ratio per answer: log R is the sum over its tokens. Loss [T], 0 outside the mask.

    An answer's loss is spread evenly over its n tokens, loss_t = loss_answer / n, so that the masked sum over tokens
    is the sum over answers. Divide that by a number of answers, not of tokens, to get a mean.
    """
    log_ratio, correct, rate = _prepare(logprobs, behaviour_logprobs, correct, correct_rate)
    if loss_mask.shape != logprobs.shape or segment_ids.shape != logprobs.shape:
        raise ValueError(
            f"loss_mask {tuple(loss_mask.shape)} and segment_ids {tuple(segment_ids.shape)} must have the shape of "
            f"logprobs, {tuple(logprobs.shape)}"
        )
    if segment_ids.numel() == 0:
        return log_ratio
    inside = loss_mask > 0
    mask = inside.to(log_ratio.dtype)
    num_segments = int(segment_ids.max()) + 1
    zeros = torch.zeros(num_segments, dtype=log_ratio.dtype, device=log_ratio.device)  # [S]
    tokens = zeros.index_add(0, segment_ids, mask).clamp(min=1.0)  # [S]
    # where, not a product: outside the mask log-probs may be anything, NaN too.
    log_ratio = zeros.index_add(0, segment_ids, torch.where(inside, log_ratio, 0.0))  # [S]
    correct = zeros.index_add(0, segment_ids, correct * mask) / tokens  # [S]
    rate = torch.full_like(zeros, 0.5).index_copy(0, segment_ids[inside], rate[inside])  # [S]
    per_answer = _nft_terms(log_ratio, correct, rate, negative_weight, clamp, prompt_weight, ratio_max_log)
    return (per_answer / tokens)[segment_ids] * mask


def negative_argument(log_ratio: Tensor, correct_rate: Tensor) -> Tensor:
    """(1 - r R) / (1 - r), the implicit negative policy's ratio before the clamp."""
    return (1.0 - correct_rate * log_ratio.exp()) / (1.0 - correct_rate)


def _nft_terms(
    log_ratio: Tensor,
    correct: Tensor,
    rate: Tensor,
    negative_weight: float,
    clamp: float,
    prompt_weight: str,
    ratio_max_log: float,
) -> Tensor:
    """The module's equation, elementwise over tokens [T] or answers [S]."""
    if not negative_weight >= 0:
        raise ValueError(f"negative_weight={negative_weight}: must be 0 (RFT) or above")
    if not clamp > 0:
        raise ValueError(f"clamp={clamp}: must be above 0, the loss takes its logarithm")
    if not ratio_max_log > 0:
        raise ValueError(f"ratio_max_log={ratio_max_log}: must be above 0")
    weight = _prompt_weight(rate, prompt_weight)
    log_ratio = log_ratio.clamp(max=ratio_max_log)
    argument = negative_argument(log_ratio, rate)
    # Clamped value, unclamped gradient. `x + (clamp(x) - x).detach()` would lose the value to rounding in fp32
    # where x is near -1e6; here the added term is exactly 0.
    straight_through = argument.detach().clamp(min=clamp) + (argument - argument.detach())
    positive, negative = -log_ratio, -straight_through.log()
    return weight * torch.where(correct > 0, positive, negative_weight * negative)


def _prompt_weight(rate: Tensor, kind: str) -> Tensor:
    """omega, shaped like `rate`."""
    if kind == "uniform":
        return torch.ones_like(rate)
    if kind == "dr_grpo":
        return 1.0 - rate
    if kind == "grpo":
        return ((1.0 - rate) / rate).sqrt()
    raise ValueError(f"prompt_weight={kind!r}: must be one of {', '.join(PROMPT_WEIGHTS)}")


def _prepare(
    logprobs: Tensor, behaviour_logprobs: Tensor, correct: Tensor, correct_rate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log R, verdict and rate in one dtype of at least 32 bits."""
    shapes = {
        "logprobs": logprobs,
        "behaviour_logprobs": behaviour_logprobs,
        "correct": correct,
        "correct_rate": correct_rate,
    }
    if logprobs.dim() != 1 or any(t.shape != logprobs.shape for t in shapes.values()):
        listed = ", ".join(f"{name} {tuple(t.shape)}" for name, t in shapes.items())
        raise ValueError(f"all tensors must be 1-D and of one length, but: {listed}")
    if not bool(((correct_rate > 0) & (correct_rate < 1)).all()):
        low, high = correct_rate.min().item(), correct_rate.max().item()
        raise ValueError(f"correct_rate spans [{low}, {high}]: must lie strictly between 0 and 1; clamp it first")
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    log_ratio = logprobs.to(dtype) - behaviour_logprobs.detach().to(dtype)
    return log_ratio, correct.to(dtype), correct_rate.to(dtype)
