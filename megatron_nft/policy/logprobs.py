"""Log-probabilities of given tokens over a vocabulary that is split over tensor-parallel ranks.

The [T, V] logits are never gathered over ranks and exist for `chunk_tokens` rows at a time: the forward pass keeps
log Z and the entropy per token, and the backward pass computes the logits again.

With logits l = h W^T / temperature, log Z = log sum_v exp(l_v) and p = exp(l - log Z):

    log p(y)  = l_y - log Z              d/dl_v = [v = y] - p_v
    H         = log Z - sum_v p_v l_v    d/dl_v = -p_v (l_v - log Z + H)

Each rank reduces its own vocabulary rows to a maximum m and sums relative to m; ranks combine these [T] vectors with
two all-reduces (max, then sum), whatever the number of chunks.

What a rank does with its rows is written twice: here in torch, in chunks over tokens, for any device and dtype; and in
policy/logprobs_triton.py, in tiles over the vocabulary, for 16-bit matrices on a GPU.

Legend: T tokens, H hidden size, V padded vocabulary, v = V / tp rows on this rank, of which `valid` are real tokens.
Sums are in fp32, or in fp64 for fp64 input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ChunkLogits = Callable[[slice], Tensor]  # rows -> [C, valid] logits, already divided by the temperature; a new tensor
NO_LOGIT = -1e30  # the maximum of no logits; finite, for 0 times it must be 0


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    sequence_parallel: bool = False,
    chunk_tokens: int = 1024,
    temperature: float = 1.0,
    with_entropy: bool = False,
    use_triton: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log p(labels) and, if asked for, the entropy, both fp32 [T] (fp64 for fp64 input), of the softmax over
    hidden [T, H] @ weight [v, H]^T / temperature.

    `labels` int64 [T] in [0, vocab_size); vocabulary rows from `vocab_size` on are padding and have probability 0
    (None: there are none). Under `sequence_parallel`, `hidden` is this rank's [T / tp, H]: it is gathered, and its
    gradient is scattered back. Otherwise `hidden` is the same on all TP ranks, and its gradient is summed over them.
    `use_triton` None uses the Triton kernels where they can be used.

    ValueError for a temperature that is not positive, for `chunk_tokens` below 1, and where `hidden` and `labels`
    differ in their number of tokens.
    """
    _check(temperature, chunk_tokens)
    kernels = triton_kernels(hidden) if use_triton is None else _kernels() if use_triton else None
    logprobs, entropy = _FromHidden.apply(
        hidden,
        weight,
        labels,
        tp_group,
        vocab_size,
        sequence_parallel,
        chunk_tokens,
        temperature,
        with_entropy,
        kernels,
    )
    return logprobs, entropy if with_entropy else None


def triton_kernels(hidden: Tensor) -> ModuleType | None:
    """policy/logprobs_triton.py where it can work on `hidden`: 16 bits, on a GPU, Triton installed."""
    if not hidden.is_cuda or hidden.dtype not in (torch.bfloat16, torch.float16):
        return None
    try:
        return _kernels()
    except ImportError:
        return None


@functools.cache
def _kernels() -> ModuleType:
    from megatron_nft.policy import logprobs_triton  # imports Triton, which a machine without a GPU need not have

    return logprobs_triton


def _check(temperature: float, chunk_tokens: int) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        tp_group: dist.ProcessGroup | None,
        vocab_size: int | None,
        sequence_parallel: bool,
        chunk_tokens: int,
        temperature: float,
        with_entropy: bool,
        kernels: ModuleType | None,
    ) -> tuple[Tensor, Tensor]:
        first, valid = _vocab_range(weight.size(0), vocab_size, tp_group)
        wide = _wide(hidden)
        hidden_TH = _gather(hidden, tp_group) if sequence_parallel else hidden
        if hidden_TH.size(0) != labels.size(0):
            raise ValueError(f"hidden has {hidden_TH.size(0)} tokens over the TP ranks, labels has {labels.size(0)}")
        real_weight = weight[:valid]

        def chunk(rows: slice) -> Tensor:
            return (hidden_TH[rows] @ real_weight.T).to(wide) / temperature

        if kernels is None:
            found = _local_sums(chunk, labels - first, valid, wide, chunk_tokens, with_entropy)
        else:
            found = kernels.local_sums(
                hidden_TH, real_weight, labels - first,
                temperature=temperature, tile_numel=_tile_numel(chunk_tokens, valid), with_entropy=with_entropy,
            )  # fmt: skip
        log_z, label_logit, entropy = _combine(*found, tp_group)
        ctx.save_for_backward(hidden, weight, labels, log_z, entropy)
        ctx.settings = (tp_group, first, valid, sequence_parallel, chunk_tokens, temperature, with_entropy, kernels)
        return _outputs(label_logit - log_z, entropy)

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple:
        hidden, weight, labels, log_z, entropy = ctx.saved_tensors
        tp_group, first, valid, sequence_parallel, chunk_tokens, temperature, with_entropy, kernels = ctx.settings
        hidden_TH = _gather(hidden, tp_group) if sequence_parallel else hidden
        grad_entropy = grad_entropy if with_entropy else None
        known = (labels - first, log_z, entropy, grad_logprobs, grad_entropy)
        if kernels is None:
            grad_hidden, grad_weight = _gradients(hidden_TH, weight, valid, *known, temperature, chunk_tokens)
        else:
            grad_weight = torch.empty_like(weight)
            grad_weight[valid:] = 0
            grad_hidden = kernels.gradients(
                hidden_TH, weight[:valid], *known,
                temperature=temperature, tile_numel=_tile_numel(chunk_tokens, valid), grad_weight=grad_weight[:valid],
            )  # fmt: skip
        grad_hidden = _scatter_sum(grad_hidden, tp_group) if sequence_parallel else _sum(grad_hidden, tp_group)
        return grad_hidden, grad_weight, None, None, None, None, None, None, None, None


def _tile_numel(chunk_tokens: int, valid: int) -> int:
    """Logits of a tile: half of what `chunk_tokens` allows, for the tile's gradient and dX stand beside it."""
    return chunk_tokens * valid // 2


def _gradients(
    hidden_TH: Tensor,
    weight: Tensor,
    valid: int,
    local_labels: Tensor,
    log_z: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    temperature: float,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """(this rank's part of dX [T, H], dW [v, H])."""
    real_weight = weight[:valid]
    grad_hidden = torch.empty_like(hidden_TH)
    grad_weight = torch.zeros_like(weight, dtype=log_z.dtype)  # [v, H], summed over chunks in fp32
    for rows in _chunks(local_labels.size(0), chunk_tokens):
        l_CV = (hidden_TH[rows] @ real_weight.T).to(log_z.dtype) / temperature
        grad_CV = _grad_logits(
            l_CV, local_labels[rows], log_z[rows], entropy[rows],
            grad_logprobs[rows], None if grad_entropy is None else grad_entropy[rows],
        )  # fmt: skip
        grad_CV = grad_CV.div_(temperature).to(hidden_TH.dtype)
        grad_hidden[rows] = grad_CV @ real_weight
        grad_weight[:valid] += grad_CV.T @ hidden_TH[rows]
    return grad_hidden, grad_weight.to(weight.dtype)


def _local_sums(
    chunk: ChunkLogits,
    local_labels: Tensor,
    valid: int,
    wide: torch.dtype,
    chunk_tokens: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Of this rank's rows: maximum m [T], and sums [3, T] of exp(l - m), of the label's l, of exp(l - m) (l - m).

    `local_labels`: labels minus this rank's first row; those outside [0, valid) belong to other ranks.
    """
    tokens, device = local_labels.size(0), local_labels.device
    maximum = torch.full((tokens,), NO_LOGIT, dtype=wide, device=device)
    sums = torch.zeros(3, tokens, dtype=wide, device=device)
    for rows in _chunks(tokens, chunk_tokens) if valid else ():
        l_CV = chunk(rows)
        maximum[rows] = l_CV.amax(-1)
        mine, index = _own(local_labels[rows], valid)
        sums[1, rows] = l_CV.gather(-1, index[:, None]).squeeze(-1).where(mine, 0)
        l_CV -= maximum[rows, None]
        e_CV = l_CV.exp()
        sums[0, rows] = e_CV.sum(-1)
        if with_entropy:
            sums[2, rows] = torch.linalg.vecdot(e_CV, l_CV)
    return maximum, sums


def _combine(maximum: Tensor, sums: Tensor, tp_group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """(log Z, logit of the label, entropy) over all ranks, each [T]; the entropy has no meaning unless asked for."""
    largest = _max(maximum, tp_group)
    shift = maximum - largest
    sums[2] += shift * sums[0]
    sums[::2] *= shift.exp()
    total, label_logit, weighted = _sum(sums, tp_group)
    log_total = total.log()
    return largest + log_total, label_logit, log_total - weighted / total


def _grad_logits(
    l_CV: Tensor,
    local_labels: Tensor,
    log_z: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Gradient with respect to the logits l [C, valid]; the equations are at the top of the file."""
    log_p = l_CV.sub_(log_z[:, None])
    factor = -grad_logprobs[:, None].to(log_p.dtype)
    if grad_entropy is not None:
        factor = factor - grad_entropy[:, None] * (log_p + entropy[:, None])
    grad = log_p.exp() * factor
    mine, index = _own(local_labels, l_CV.size(1))
    if l_CV.size(1):
        grad.scatter_add_(-1, index[:, None], grad_logprobs.to(grad.dtype).where(mine, 0)[:, None])
    return grad


def _outputs(logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
    narrow = torch.float64 if logprobs.dtype is torch.float64 else torch.float32
    return logprobs.to(narrow), entropy.to(narrow)


def _own(local_labels: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    """(which labels are this rank's, an index that is in range for all)."""
    mine = (local_labels >= 0) & (local_labels < valid)
    return mine, local_labels.where(mine, 0)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _chunks(tokens: int, chunk_tokens: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk_tokens, tokens)) for start in range(0, tokens, chunk_tokens))


def _vocab_range(rows: int, vocab_size: int | None, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(first vocabulary row of this rank, how many of its `rows` are real tokens)."""
    first = rows * (group.rank() if group is not None else 0)
    return first, rows if vocab_size is None else min(max(vocab_size - first, 0), rows)


def _alone(group: dist.ProcessGroup | None) -> bool:
    return group is None or group.size() == 1


def _max(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if _alone(group):
        return x
    x = x.clone()
    dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
    return x


def _sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if not _alone(group):
        dist.all_reduce(x, group=group)
    return x


def _gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[T / tp, H] of each rank -> [T, H]."""
    if _alone(group):
        return x
    out = x.new_empty(x.size(0) * group.size(), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def _scatter_sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[T, H] of each rank -> this rank's [T / tp, H] of the sum."""
    if _alone(group):
        return x
    out = x.new_empty(x.size(0) // group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out
