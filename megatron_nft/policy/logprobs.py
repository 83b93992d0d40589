"""Log-probabilities of given tokens over a vocabulary that is split over tensor-parallel ranks.

The [T, V] logits are never gathered over ranks and exist for `chunk_tokens` rows at a time: the forward pass keeps
log Z and the entropy per token, and the backward pass computes the logits again.

With logits l = h W^T / temperature, log Z = log sum_v exp(l_v) and p = exp(l - log Z):

    log p(y)  = l_y - log Z              d/dl_v = [v = y] - p_v
    H         = log Z - sum_v p_v l_v    d/dl_v = -p_v (l_v - log Z + H)

Each rank reduces its own vocabulary rows to a maximum m and sums relative to m; ranks combine these [T] vectors with
two all-reduces (max, then sum), whatever the number of chunks.

What a rank does with its own rows is written twice (policy/logprobs_kernels.py). Where a loss is per token,
policy/one_pass.py gets by without the second computation of the logits.

Legend: T tokens, H hidden size, V padded vocabulary, v = V / tp rows on this rank, of which `valid` are real tokens.
Sums are in fp32, or in fp64 for fp64 input.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nft.policy.logprobs_kernels import Kernels, choose_kernels
from megatron_nft.policy.vocab_parallel import all_sum, combine, gather, scatter_sum, vocab_range


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
    check(temperature, chunk_tokens)
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
        choose_kernels(hidden, use_triton),
    )
    return logprobs, entropy if with_entropy else None


def check(temperature: float, chunk_tokens: int) -> None:
    """ValueError for a temperature or a size of chunks that cannot be."""
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
        first, valid = vocab_range(weight.size(0), vocab_size, tp_group)
        hidden_TH = gather(hidden, tp_group) if sequence_parallel else hidden
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
        log_z, label_logit, entropy = combine(maximum, sums, tp_group)
        ctx.save_for_backward(hidden, weight, labels, log_z, entropy)
        ctx.settings = (tp_group, first, valid, sequence_parallel, chunk_tokens, temperature, with_entropy, kernels)
        return _outputs(label_logit - log_z, entropy)

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, log_z, entropy = ctx.saved_tensors
        tp_group, first, valid, sequence_parallel, chunk_tokens, temperature, with_entropy, kernels = ctx.settings
        hidden_TH = gather(hidden, tp_group) if sequence_parallel else hidden
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
        grad_hidden = scatter_sum(grad_hidden, tp_group) if sequence_parallel else all_sum(grad_hidden, tp_group)
        return grad_hidden, grad_weight, None, None, None, None, None, None, None, None


def _outputs(logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
    narrow = torch.float64 if logprobs.dtype is torch.float64 else torch.float32
    return logprobs.to(narrow), entropy.to(narrow)
