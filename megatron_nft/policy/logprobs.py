"""Log-probabilities of given tokens over a vocabulary that is split over tensor-parallel ranks.

The [T, V] logits are never gathered over ranks and exist for `chunk_tokens` rows at a time: the forward pass keeps
log Z and the entropy per token, and the backward pass computes the logits again.

With logits l = h W^T / temperature, log Z = log sum_v exp(l_v) and p = exp(l - log Z):

    log p(y)  = l_y - log Z              d/dl_v = [v = y] - p_v
    H         = log Z - sum_v p_v l_v    d/dl_v = -p_v (l_v - log Z + H)

Each rank reduces its own vocabulary rows to a maximum m and sums relative to m; ranks combine these [T] vectors with
two all-reduces (max, then sum), whatever the number of chunks.

What a rank does with its own rows (`Kernels`) is written twice: policy/logprobs_torch.py works on any device and dtype,
in chunks of tokens; policy/logprobs_triton.py on 16-bit matrices on a GPU, in tiles of the vocabulary.

Legend: T tokens, H hidden size, V padded vocabulary, v = V / tp rows on this rank, of which `valid` are real tokens.
Sums are in fp32, or in fp64 for fp64 input.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nft.policy import logprobs_torch


class Kernels(Protocol):
    """What a rank computes from its own vocabulary rows: a module with these functions. At most about `max_logits`
    logits exist at a time."""

    def local_sums(
        self,
        hidden: Tensor,
        weight: Tensor,
        local_labels: Tensor,
        *,
        temperature: float,
        max_logits: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        """The logits are l = hidden [T, H] @ weight [v, H]^T / temperature, in fp32 (fp64 for fp64 input). Returns, per
        token, their maximum m [T] and the sums [3, T] of exp(l - m), of the label's l, and of exp(l - m) (l - m).

        `local_labels` int64 [T]: labels minus this rank's first row; those outside [0, v) belong to other ranks. The
        last sum has no meaning without `with_entropy`.
        """
        ...

    def gradients(
        self,
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
        """dX [T, H] in the dtype of `hidden`, this rank's part of the sum over the vocabulary. dW is written to
        `grad_weight` [v, H]. All other vectors are [T], in fp32 or fp64."""
        ...


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
    kernels = triton_kernels(hidden) if use_triton is None else _triton() if use_triton else None
    logprobs, entropy = _FromHidden.apply(  # type: ignore[no-untyped-call]  # torch gives it no types
        hidden,
        weight,
        labels,
        tp_group,
        vocab_size,
        sequence_parallel,
        chunk_tokens,
        temperature,
        with_entropy,
        kernels or logprobs_torch,
    )
    return logprobs, entropy if with_entropy else None


def triton_kernels(hidden: Tensor) -> Kernels | None:
    """policy/logprobs_triton.py where it can work on `hidden`: 16 bits, on a GPU, with Triton installed."""
    if not hidden.is_cuda or hidden.dtype not in (torch.bfloat16, torch.float16):
        return None
    try:
        return _triton()
    except ImportError:
        return None


@functools.cache
def _triton() -> Kernels:
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
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor]:
        first, valid = _vocab_range(weight.size(0), vocab_size, tp_group)
        hidden_TH = _gather(hidden, tp_group) if sequence_parallel else hidden
        if hidden_TH.size(0) != labels.size(0):
            raise ValueError(f"hidden has {hidden_TH.size(0)} tokens over the TP ranks, labels has {labels.size(0)}")
        maximum, sums = kernels.local_sums(
            hidden_TH,
            weight[:valid],
            labels - first,
            temperature=temperature,
            max_logits=chunk_tokens * valid,
            with_entropy=with_entropy,
        )
        log_z, label_logit, entropy = _combine(maximum, sums, tp_group)
        ctx.save_for_backward(hidden, weight, labels, log_z, entropy)
        ctx.settings = (tp_group, first, valid, sequence_parallel, chunk_tokens, temperature, with_entropy, kernels)
        return _outputs(label_logit - log_z, entropy)

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, log_z, entropy = ctx.saved_tensors
        tp_group, first, valid, sequence_parallel, chunk_tokens, temperature, with_entropy, kernels = ctx.settings
        hidden_TH = _gather(hidden, tp_group) if sequence_parallel else hidden
        grad_weight = torch.empty_like(weight)
        grad_weight[valid:] = 0
        grad_hidden = cast(Kernels, kernels).gradients(
            hidden_TH,
            weight[:valid],
            labels - first,
            log_z,
            entropy,
            grad_logprobs,
            grad_entropy if with_entropy else None,
            temperature=temperature,
            max_logits=chunk_tokens * valid,
            grad_weight=grad_weight[:valid],
        )
        grad_hidden = _scatter_sum(grad_hidden, tp_group) if sequence_parallel else _sum(grad_hidden, tp_group)
        return grad_hidden, grad_weight, None, None, None, None, None, None, None, None


def _combine(maximum: Tensor, sums: Tensor, tp_group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """(log Z, logit of the label, entropy) over all ranks, each [T]; the entropy has no meaning unless asked for."""
    largest = _max(maximum, tp_group)
    shift = maximum - largest
    sums[2] += shift * sums[0]
    sums[::2] *= shift.exp()
    total, label_logit, weighted = _sum(sums, tp_group)
    log_total = total.log()
    return largest + log_total, label_logit, log_total - weighted / total


def _outputs(logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
    narrow = torch.float64 if logprobs.dtype is torch.float64 else torch.float32
    return logprobs.to(narrow), entropy.to(narrow)


def _vocab_range(rows: int, vocab_size: int | None, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(first vocabulary row of this rank, how many of its `rows` are real tokens)."""
    first = rows * (group.rank() if group is not None else 0)
    return first, rows if vocab_size is None else min(max(vocab_size - first, 0), rows)


def _max(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is None or group.size() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
    return x


def _sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(x, group=group)
    return x


def _gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[T / tp, H] of each rank -> [T, H]."""
    if group is None or group.size() == 1:
        return x
    out = x.new_empty(x.size(0) * group.size(), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def _scatter_sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[T, H] of each rank -> this rank's [T / tp, H] of the sum."""
    if group is None or group.size() == 1:
        return x
    out = x.new_empty(x.size(0) // group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out
