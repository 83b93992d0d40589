"""Output layer and loss in one pass, for losses that are per token: the logits are made once.

A per-token loss gives a token's gradient as soon as the token's log Z is known. So both gradients are formed in the
forward pass, a chunk of tokens at a time, and the chunk's logits are forgotten:

    for each chunk of C tokens    l = h W^T / temperature                          2 C H V operations
                                  log Z, log p(label); loss and g = d loss / d log p(label)
                                  d loss / d l_v = g ([v = label] - p_v)
                                  dX = (d loss / d l) W / temperature              2 C H V
                                  dW += (d loss / d l)^T h / temperature           2 C H V

6 T H V operations, against 8 T H V of policy/logprobs.py, which makes the logits again in the backward pass. The price
is that dW, fp32 [v, H], is read and written once per chunk: chunks are as large as memory allows.

dW goes straight into Megatron's fp32 main gradient during the forward pass, so the scale of the loss must be known by
then: it is an argument, and a gradient from above that is not 1 is refused. Nothing may run the forward pass twice with
gradients; Megatron's recomputation does not reach the output layer.

Legend: T tokens, C tokens of a chunk, H hidden size, v = V / tp rows on this rank, of which `valid` are real tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nft.policy.logprobs import check
from megatron_nft.policy.logprobs_kernels import Kernels, choose_kernels
from megatron_nft.policy.vocab_parallel import all_sum, combine, gather, scatter_sum, vocab_range

TokenLoss = Callable[[Tensor, slice], Tensor]
"""(log-probs [C] with gradient, which of the T tokens they are) -> what each token adds to the loss, [C]."""


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_loss: TokenLoss,
    *,
    scale: float = 1.0,
    weight_is_shared: bool = False,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    sequence_parallel: bool = False,
    chunk_tokens: int = 1024,
    temperature: float = 1.0,
    use_triton: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(scale x sum over tokens of `token_loss`, scalar with gradient; log-probs [T]; token losses [T]), fp32 (fp64 for
    fp64 input). Arguments that `logprobs.linear_logprobs` has too mean the same.

    `weight.main_grad` (fp32 [v, H]), where it is there, gets dW during this call, and `weight` no gradient of its own;
    else the gradient is returned to autograd. `weight_is_shared`: another use of `weight` on this rank brings a
    gradient by way of autograd (a tied embedding), which Megatron's hook must add to the main gradient. Without
    gradients (torch.no_grad), nothing is added.

    ValueError as `linear_logprobs`. RuntimeError in the backward pass where the result was multiplied by anything
    but 1.
    """
    check(temperature, chunk_tokens)
    loss, logprobs, losses = _OnePass.apply(  # type: ignore[no-untyped-call]  # torch gives it no types
        hidden,
        weight,
        labels,
        token_loss,
        scale,
        weight_is_shared,
        tp_group,
        vocab_size,
        sequence_parallel,
        chunk_tokens,
        temperature,
        choose_kernels(hidden, use_triton),
        torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad),
    )
    return loss, logprobs, losses


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        token_loss: TokenLoss,
        scale: float,
        weight_is_shared: bool,
        tp_group: dist.ProcessGroup | None,
        vocab_size: int | None,
        sequence_parallel: bool,
        chunk_tokens: int,
        temperature: float,
        kernels: Kernels,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        first, valid = vocab_range(weight.size(0), vocab_size, tp_group)
        h_TH = gather(hidden, tp_group) if sequence_parallel else hidden
        if h_TH.size(0) != labels.size(0):
            raise ValueError(f"hidden has {h_TH.size(0)} tokens over the TP ranks, labels has {labels.size(0)}")
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, losses = hidden.new_empty(2, labels.size(0), dtype=wide)
        main_grad: Tensor | None = getattr(weight, "main_grad", None)
        if with_gradients:
            grad_hidden = torch.empty_like(h_TH)
            grad_weight = torch.zeros_like(weight, dtype=wide) if main_grad is None else main_grad
        for rows in kernels.token_chunks(labels.size(0), chunk_tokens):
            chunk, own_labels = h_TH[rows], labels[rows] - first
            logits, maximum, sums = kernels.chunk_logits(chunk, weight[:valid], own_labels, temperature=temperature)
            log_z, label_logit, _ = combine(maximum, sums, tp_group)
            logprobs[rows] = label_logit - log_z
            losses[rows], grad_logprobs = _evaluate(token_loss, logprobs[rows], rows)
            if with_gradients:
                kernels.chunk_gradients(
                    logits,
                    chunk,
                    weight[:valid],
                    own_labels,
                    log_z,
                    grad_logprobs * scale,
                    temperature=temperature,
                    grad_hidden=grad_hidden[rows],
                    grad_weight=grad_weight[:valid],
                )
            del logits  # before the next ones are made
        ctx.mark_non_differentiable(logprobs, losses)
        if with_gradients:
            grad_hidden = scatter_sum(grad_hidden, tp_group) if sequence_parallel else all_sum(grad_hidden, tp_group)
            ctx.save_for_backward(grad_hidden, None if main_grad is not None else grad_weight.to(weight.dtype))
            ctx.weight = weight if main_grad is not None and not weight_is_shared else None
        return losses.sum() * scale, logprobs, losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        torch._assert_async(
            grad == 1, "the loss of policy.lm_head=one_pass was scaled after its gradients were formed; use two_pass"
        )
        if ctx.weight is not None:
            _announce(ctx.weight)
        return grad_hidden, grad_weight, *[None] * 11


def _evaluate(token_loss: TokenLoss, logprobs: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Losses of a chunk's tokens and their gradient with respect to its log-probs, both [C]."""
    with torch.enable_grad():
        leaf = logprobs.clone().requires_grad_()
        losses = token_loss(leaf, rows)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient


def _announce(weight: Tensor) -> None:
    """Tell Megatron's DistributedDataParallel that the main gradient has this micro-batch's part.

    Its hook wants to see a gradient and drops it: zeros that take no memory.
    """
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # Megatron's own mark
    weight.grad = weight.new_zeros(()).expand_as(weight)


def uses_one_pass(setting: str, device: torch.device) -> bool:
    """Whether `policy.lm_head` asks for one pass on `device`, if the loss is per token."""
    return setting == "one_pass" or (setting == "auto" and device.type == "cpu")
