"""What a rank computes of log-probs from its own vocabulary rows, written twice.

policy/logprobs_torch.py works on any device and dtype, in chunks of tokens; policy/logprobs_triton.py on 16-bit
matrices on a GPU, in tiles of the vocabulary, or in one pass (policy/one_pass.py) in chunks of tokens.

Legend: T tokens, C tokens of a chunk, H hidden size, v vocabulary rows of this rank, `valid` of which are real tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from megatron_nft.policy import logprobs_torch


class Kernels(Protocol):
    """What a rank computes from its own vocabulary rows: a module with these functions. In the first two at most about
    `max_logits` logits exist at a time; the others are of one pass."""

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

    def token_chunks(self, tokens: int, chunk_tokens: int) -> Iterator[slice]:
        """The chunks: as large as what `chunk_tokens` tokens may take in memory allows; the same on all TP ranks."""
        ...

    def chunk_logits(
        self, hidden: Tensor, weight: Tensor, local_labels: Tensor, *, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [C, H], weight [valid, H] -> logits [C, valid] for `chunk_gradients`, and the maximum [C] and sums
        [3, C] of `local_sums`, without the last sum."""
        ...

    def chunk_gradients(
        self,
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
        """Writes this rank's part of dX to `grad_hidden` [C, H] and adds dW to `grad_weight` [valid, H], fp32 or fp64.
        `logits` are used up."""
        ...


def triton_kernels(hidden: Tensor) -> Kernels | None:
    """policy/logprobs_triton.py where it can work on `hidden`: 16 bits, on a GPU, with Triton installed."""
    if not hidden.is_cuda or hidden.dtype not in (torch.bfloat16, torch.float16):
        return None
    try:
        return _triton()
    except ImportError:
        return None


def choose_kernels(hidden: Tensor, use_triton: bool | None) -> Kernels:
    """The kernels for `hidden`: Triton's where they can be used (None), always, or never."""
    if use_triton is None:
        return triton_kernels(hidden) or logprobs_torch
    return _triton() if use_triton else logprobs_torch


@functools.cache
def _triton() -> Kernels:
    from megatron_nft.policy import logprobs_triton  # imports Triton, which a machine without a GPU need not have

    return logprobs_triton
