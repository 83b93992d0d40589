"""A decoding loop over a transformers model: prompts filled once, answers batched, ended rows removed.

Legend: Q distinct prompts, B rows (answers under way), L columns (prompt padded on the left, then the answer).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer

from megatron_nft.engines.embedded.sampling import draw_tokens, uniforms
from megatron_nft.engines.engine import SamplingParams

COMPACT_BELOW = 0.75
"""Ended rows are removed once the share of rows under way falls below this: a copy of the cache, paid back soon."""


class _GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # of transformers' __init_subclass__
    """Keys and values in a buffer that doubles, so that a step writes one column in place of copying them all."""

    _buffers: tuple[torch.Tensor, torch.Tensor]  # of the keys and of the values, [B, heads, columns, D]
    _filled = 0  # columns

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, heads, new, D] each; returns all columns so far, [B, heads, L, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = key_states[:, :, :0], value_states[:, :, :0]
        start, end = self._filled, self._filled + key_states.shape[2]
        if end > self._buffers[0].shape[2]:
            keys, values = self._buffers
            columns = max(2 * start, end + 16)
            self._buffers = self._grown(keys[:, :, :start], columns), self._grown(values[:, :, :start], columns)
        keys, values = self._show(end)
        keys[:, :, start:] = key_states
        values[:, :, start:] = value_states
        return keys, values

    def _show(self, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the first columns of the buffers the layer's keys and values."""
        keys, values = (buffer[:, :, :columns] for buffer in self._buffers)
        self.keys, self.values, self._filled = keys, values, columns
        return keys, values

    @staticmethod
    def _grown(tensor: torch.Tensor, columns: int) -> torch.Tensor:
        rows, heads, filled, width = tensor.shape
        grown = tensor.new_empty(rows, heads, columns, width)
        grown[:, :, :filled] = tensor
        return grown

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps (or repeats) the rows named by int64 `indices`."""
        keys, values = self._buffers
        self._buffers = keys.index_select(0, indices), values.index_select(0, indices)
        self._show(self._filled)


def _left_padded(prompts: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [Q, P] with 0 on the left of shorter prompts, and the number of those per row, int64 [Q]."""
    width = max(len(p) for p in prompts)
    tokens_QP = np.zeros((len(prompts), width), dtype=np.int64)
    for row, prompt in zip(tokens_QP, prompts):
        row[width - len(prompt) :] = prompt
    padding_Q = np.array([width - len(p) for p in prompts], dtype=np.int64)
    return torch.from_numpy(tokens_QP), torch.from_numpy(padding_Q)


class _Forward:
    """The model with its cache: feeds tokens, keeps mask and positions of rows whose prompts differ in length."""

    def __init__(self, model: Any, padding_B: torch.Tensor) -> None:
        self.model, self.padding_B = model, padding_B
        self.cache = Cache(layer_class_to_replicate=_GrowingLayer)
        self.columns = 0
        self.padded = bool(padding_B.any())

    def __call__(self, tokens_BN: torch.Tensor) -> torch.Tensor:
        """int64 [B, N] new tokens -> logits [B, V] of the last."""
        start, self.columns = self.columns, self.columns + tokens_BN.shape[1]
        column_L = torch.arange(self.columns, device=tokens_BN.device)
        mask_BL, position_BN = None, column_L[None, start:]
        if self.padded:
            mask_BL = column_L >= self.padding_B[:, None]
            position_BN = (position_BN - self.padding_B[:, None]).clamp_(min=0)
        logits: torch.Tensor = self.model(
            input_ids=tokens_BN,
            attention_mask=mask_BL,
            position_ids=position_BN,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1]

    def select(self, rows: torch.Tensor) -> None:
        """Goes on with some of the rows so far: their int64 indices, repeats allowed."""
        self.cache.batch_select_indices(rows)
        self.padding_B = self.padding_B[rows]


@torch.inference_mode()
def decode(
    model: Any,
    prompts: Sequence[np.ndarray],
    prompt_of_row: np.ndarray,
    keys: np.ndarray,
    sampling: SamplingParams,
    stop_token_ids: frozenset[int],
) -> Iterator[tuple[int, np.ndarray, np.ndarray, str] | None]:
    """Answers as they end: (row, token ids int32 [R], log-probs float32 [R], stop | length). None after each position.

    prompts: Q arrays of token ids; prompt_of_row: int64 [B], which of them each answer belongs to;
    keys: uint64 [B], the rows' random states (`sampling.row_keys`).
    """
    device = next(model.parameters()).device
    tokens_QP, padding_Q = _left_padded(prompts)
    forward = _Forward(model, padding_Q.to(device))
    logits = forward(tokens_QP.to(device))
    rows_device = torch.from_numpy(prompt_of_row).to(device)
    forward.select(rows_device)
    logits = logits[rows_device]

    num_rows = len(prompt_of_row)
    stops = np.array(sorted(stop_token_ids), dtype=np.int64)
    answer_ids = np.zeros((num_rows, sampling.max_tokens), dtype=np.int32)
    answer_logprobs = np.zeros((num_rows, sampling.max_tokens), dtype=np.float32)
    rows = np.arange(num_rows)  # of the answers, for each row of the batch
    live = np.ones(num_rows, dtype=bool)  # which rows of the batch are still under way
    for position in range(sampling.max_tokens):
        uniform_B = torch.from_numpy(uniforms(keys[rows], np.full(len(rows), position)))
        token_B, logprob_B = draw_tokens(logits, uniform_B.to(device), sampling)
        token_ids = token_B.cpu().numpy()
        answer_ids[rows, position] = token_ids
        answer_logprobs[rows, position] = logprob_B.cpu().numpy()
        stopped = live & np.isin(token_ids, stops)
        ended = live if position + 1 == sampling.max_tokens else stopped
        for at in np.flatnonzero(ended):
            row = int(rows[at])
            reason = "stop" if stopped[at] else "length"
            yield row, answer_ids[row, : position + 1].copy(), answer_logprobs[row, : position + 1].copy(), reason
        yield None
        live = live & ~ended
        num_live = int(live.sum())
        if num_live == 0:
            return
        if num_live < COMPACT_BELOW * len(rows):
            kept = torch.from_numpy(np.flatnonzero(live)).to(device)
            forward.select(kept)
            token_B, rows, live = token_B[kept], rows[live], np.ones(num_live, dtype=bool)
        logits = forward(token_B[:, None])
