"""Log-probs from hidden states in plain torch, for any device and dtype: the logits of some tokens at a time.

The equations are those of policy/logprobs.py, which does the rest, tensor parallelism included.

Legend: T tokens, H hidden size, v real vocabulary rows of this rank, C tokens of a chunk. Sums are in fp32, or in fp64
for fp64 input.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

NO_LOGIT = -1e30  # the maximum of no logits; finite, for 0 times it must be 0


def local_sums(
    hidden: Tensor, weight: Tensor, local_labels: Tensor, *, temperature: float, max_logits: int, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    """See `logprobs_kernels.Kernels.local_sums`."""
    tokens, valid, wide = hidden.size(0), weight.size(0), torch.promote_types(hidden.dtype, torch.float32)
    maximum = torch.full((tokens,), NO_LOGIT, dtype=wide, device=hidden.device)
    sums = torch.zeros(3, tokens, dtype=wide, device=hidden.device)
    for rows in _chunks(tokens, valid, max_logits) if valid else ():
        l_CV = (hidden[rows] @ weight.T).to(wide) / temperature
        maximum[rows] = l_CV.amax(-1)
        sums[1, rows] = _label_logits(l_CV, local_labels[rows])
        l_CV -= maximum[rows, None]
        e_CV = l_CV.exp()
        sums[0, rows] = e_CV.sum(-1)
        if with_entropy:
            sums[2, rows] = torch.linalg.vecdot(e_CV, l_CV)
    return maximum, sums


def gradients(
    hidden: Tensor,
    weight: Tensor,
    local_labels: Tensor,
    log_z: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    *,
    temperature: float,
    max_logits: int,
    grad_weight: Tensor,
) -> Tensor:
    """See `logprobs_kernels.Kernels.gradients`. The gradient of the weight is summed over chunks in fp32."""
    grad_hidden = torch.empty_like(hidden)
    in_place = grad_weight.dtype is log_z.dtype
    total = grad_weight.zero_() if in_place else torch.zeros_like(grad_weight, dtype=log_z.dtype)  # [v, H]
    for rows in _chunks(hidden.size(0), weight.size(0), max_logits):
        l_CV = (hidden[rows] @ weight.T).to(log_z.dtype) / temperature
        grad_CV = _grad_logits(
            l_CV, local_labels[rows], log_z[rows], entropy[rows],
            grad_logprobs[rows], None if grad_entropy is None else grad_entropy[rows],
        )  # fmt: skip
        grad_CV = grad_CV.div_(temperature).to(hidden.dtype)
        grad_hidden[rows] = grad_CV @ weight
        total += grad_CV.T @ hidden[rows]
    if not in_place:
        grad_weight.copy_(total)
    return grad_hidden


def token_chunks(tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """See `logprobs_kernels.Kernels.token_chunks`."""
    return _chunks(tokens, 1, chunk_tokens)


def chunk_logits(
    hidden: Tensor, weight: Tensor, local_labels: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `logprobs_kernels.Kernels.chunk_logits`."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    l_CV = (hidden @ weight.T).to(wide).div_(temperature)
    maximum = l_CV.amax(-1) if weight.size(0) else l_CV.new_full((hidden.size(0),), NO_LOGIT)
    sums = l_CV.new_zeros(3, hidden.size(0))
    sums[0] = (l_CV - maximum[:, None]).exp_().sum(-1)
    sums[1] = _label_logits(l_CV, local_labels)
    return l_CV, maximum, sums


def chunk_gradients(
    logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    local_labels: Tensor,
    log_z: Tensor,
    grad_logprobs: Tensor,
    *,
    temperature: float,
    grad_hidden: Tensor,
    grad_weight: Tensor,
) -> None:
    """See `logprobs_kernels.Kernels.chunk_gradients`."""
    grad_CV = _grad_logits(logits, local_labels, log_z, log_z, grad_logprobs, None)
    grad_CV = grad_CV.div_(temperature).to(hidden.dtype)
    torch.mm(grad_CV, weight, out=grad_hidden)
    if grad_weight.dtype is hidden.dtype:
        grad_weight.addmm_(grad_CV.T, hidden)
    else:
        grad_weight += grad_CV.T @ hidden


def _grad_logits(
    l_CV: Tensor,
    local_labels: Tensor,
    log_z: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Gradient with respect to the logits l [C, valid]; the equations are those of policy/logprobs.py."""
    log_p = l_CV.sub_(log_z[:, None])
    factor = -grad_logprobs[:, None].to(log_p.dtype)
    if grad_entropy is None:
        grad = log_p.exp_().mul_(factor)
    else:
        factor = factor - grad_entropy[:, None] * (log_p + entropy[:, None])
        grad = log_p.exp() * factor
    mine, index = _own(local_labels, l_CV.size(1))
    if l_CV.size(1):
        grad.scatter_add_(-1, index[:, None], grad_logprobs.to(grad.dtype).where(mine, 0)[:, None])
    return grad


def _label_logits(l_CV: Tensor, local_labels: Tensor) -> Tensor:
    """The logit of each token's label, [C]; 0 where it is another rank's."""
    if not l_CV.size(1):
        return l_CV.new_zeros(l_CV.size(0))
    mine, index = _own(local_labels, l_CV.size(1))
    return l_CV.gather(-1, index[:, None]).squeeze(-1).where(mine, 0)


def _own(local_labels: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    """(which labels are this rank's, an index that is in range for all)."""
    mine = (local_labels >= 0) & (local_labels < valid)
    return mine, local_labels.where(mine, 0)


def _chunks(tokens: int, columns: int, max_logits: int) -> Iterator[slice]:
    """The tokens of each chunk: as many as have `max_logits` logits of `columns` each, at least one."""
    size = max(1, max_logits // max(1, columns))
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))
