"""A decoding loop over a transformers model: prompts filled once, answers batched, ended rows removed, others joining.

Legend: Q distinct prompts, B rows (answers under way), L columns (padding on the left, the prompt, then the answer).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
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

    def join(self, other: _GrowingLayer, start: int) -> None:
        """Takes the rows of `other` too; of its own columns those from `start` on. The shorter get empty columns on the
        left."""
        columns = max(self._filled - start, other._filled)
        both = zip(self._buffers, other._buffers, strict=True)
        pairs = ((mine[:, :, start : self._filled], theirs[:, :, : other._filled]) for mine, theirs in both)
        keys, values = (torch.cat([_filled_left(tensor, columns) for tensor in pair]) for pair in pairs)
        self._buffers = keys, values
        self._show(columns)


def _filled_left(tensor: torch.Tensor, columns: int) -> torch.Tensor:
    """[B, heads, L, D] -> [B, heads, columns, D] with zeros on the left."""
    return torch.nn.functional.pad(tensor, (0, 0, columns - tensor.shape[2], 0))


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
        # transformers 5.24 renamed it, and takes the old name until 5.40
        parameters = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"
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
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: self.cache},
        ).logits
        return logits[:, -1]

    def select(self, rows: torch.Tensor) -> None:
        """Goes on with some of the rows so far: their int64 indices, repeats allowed."""
        self.cache.batch_select_indices(rows)
        self.padding_B = self.padding_B[rows]

    def join(self, other: _Forward) -> None:
        """Goes on with the rows of `other` too. Columns that no row needs any more are given back."""
        unused = int(self.padding_B.min())
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            assert isinstance(mine, _GrowingLayer) and isinstance(theirs, _GrowingLayer)
            mine.join(theirs, unused)
        columns = max(self.columns - unused, other.columns)
        paddings = (self.padding_B + (columns - self.columns), other.padding_B + (columns - other.columns))
        self.padding_B, self.columns = torch.cat(paddings), columns
        self.padded = bool(self.padding_B.any())


def row_width(prompt_tokens: int, max_tokens: int, limit: int) -> int:
    """Columns of an answer that takes all of `max_tokens`. ValueError where the model takes no more than `limit`."""
    if not 0 < prompt_tokens <= limit - max_tokens:
        raise ValueError(
            f"a prompt of {prompt_tokens} tokens and max_tokens={max_tokens}: the model takes "
            f"1 to {limit} tokens in all (max_position_embeddings)"
        )
    return prompt_tokens + max_tokens


@dataclass(slots=True)
class _Rows:
    """What is known of the answers under way, one entry per row."""

    number: np.ndarray  # int64 [B], as the owner numbers them
    keys: np.ndarray  # uint64 [B], random states
    length: np.ndarray  # int64 [B], tokens so far
    token_ids: np.ndarray  # int32 [B, max_tokens]
    logprobs: np.ndarray  # float32 [B, max_tokens]

    def select(self, rows: np.ndarray) -> _Rows:
        return _Rows(*(getattr(self, field.name)[rows] for field in fields(self)))

    def joined(self, other: _Rows) -> _Rows:
        return _Rows(*(np.concatenate([getattr(r, field.name) for r in (self, other)]) for field in fields(self)))


class Batch:
    """Answers that are decoded together; more may join between two positions, and each leaves when it ends.

    What a row draws hangs on its own random state and position alone, not on the rows beside it.
    """

    def __init__(self, model: Any, sampling: SamplingParams, stop_token_ids: frozenset[int]) -> None:
        self._model, self._sampling = model, sampling
        self._device = next(model.parameters()).device
        self._stops = np.array(sorted(stop_token_ids), dtype=np.int64)
        self._rows: _Rows | None = None
        self._live = np.ones(0, dtype=bool)  # which rows are still under way
        self._forward: _Forward
        self._logits: torch.Tensor  # [B, V], of each row's next token
        self._fed: torch.Tensor | None = None  # int64 [B], drawn and not read by the model yet

    def __len__(self) -> int:
        """Number of answers under way."""
        return int(self._live.sum())

    @torch.inference_mode()
    def add(
        self,
        prompts: Sequence[np.ndarray],
        prompt_of_row: np.ndarray,
        number: np.ndarray,
        keys: np.ndarray,
        prefixes: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    ) -> None:
        """Begin answers, or go on with some.

        prompts: Q arrays of token ids, prefixes of answers included; prompt_of_row: int64 [B], which of them each
        answer follows; number: int64 [B], what `step` calls it; keys: uint64 [B], random states (`sampling.row_keys`);
        prefixes: by row, token ids and log-probs of what there is already; empty where all begin.
        """
        self._feed()
        tokens_QP, padding_Q = _left_padded(prompts)
        forward = _Forward(self._model, padding_Q.to(self._device))
        logits = forward(tokens_QP.to(self._device))
        rows_device = torch.from_numpy(prompt_of_row).to(self._device)
        forward.select(rows_device)
        logits = logits[rows_device]
        size = (len(number), self._sampling.max_tokens)
        length = np.zeros(len(number), dtype=np.int64)
        rows = _Rows(number, keys, length, np.zeros(size, dtype=np.int32), np.zeros(size, dtype=np.float32))
        for row, (token_ids, logprobs) in enumerate(prefixes):
            length[row] = count = len(token_ids)
            rows.token_ids[row, :count], rows.logprobs[row, :count] = token_ids, logprobs
        if self._rows is None or not len(self):
            self._rows, self._forward, self._logits = rows, forward, logits
            self._live = np.ones(len(number), dtype=bool)
            return
        self._forward.join(forward)
        self._rows, self._logits = self._rows.joined(rows), torch.cat([self._logits, logits])
        self._live = np.concatenate([self._live, np.ones(len(number), dtype=bool)])

    @torch.inference_mode()
    def step(self) -> list[Decoded]:
        """One more token of every answer under way; returns those that it ended."""
        self._feed()
        rows = self._rows
        assert rows is not None, "nothing was added"
        every = np.arange(len(rows.number))
        uniform_B = torch.from_numpy(uniforms(rows.keys, rows.length))
        token_B, logprob_B = draw_tokens(self._logits, uniform_B.to(self._device), self._sampling)
        token_ids = token_B.cpu().numpy()
        # A row that has ended is drawn on until it is removed; it has no room then.
        at = np.minimum(rows.length, self._sampling.max_tokens - 1)
        rows.token_ids[every, at] = token_ids
        rows.logprobs[every, at] = logprob_B.cpu().numpy()
        rows.length += 1
        stopped = self._live & np.isin(token_ids, self._stops)
        ended = self._live & (stopped | (rows.length >= self._sampling.max_tokens))
        found = [self._answer(row, "stop" if stopped[row] else "length") for row in np.flatnonzero(ended).tolist()]
        self._live &= ~ended
        self._fed = token_B
        return found

    def _answer(self, row: int, reason: str) -> Decoded:
        assert self._rows is not None
        rows, length = self._rows, int(self._rows.length[row])
        answer = (rows.token_ids[row, :length].copy(), rows.logprobs[row, :length].copy())
        return int(rows.number[row]), *answer, reason

    def under_way(self) -> list[Decoded]:
        """Every answer under way as it stands; its reason is empty."""
        return [self._answer(row, "") for row in np.flatnonzero(self._live).tolist()]

    def _feed(self) -> None:
        """Let the model read the tokens that were drawn last. Rows that have ended are removed where it pays."""
        if self._fed is None or not len(self):
            self._fed = None
            return
        token_B, self._fed = self._fed, None
        if len(self) < COMPACT_BELOW * len(self._live):
            kept = np.flatnonzero(self._live)
            kept_device = torch.from_numpy(kept).to(self._device)
            self._forward.select(kept_device)
            assert self._rows is not None
            token_B, self._rows, self._live = token_B[kept_device], self._rows.select(kept), np.ones(len(kept), bool)
        self._logits = self._forward(token_B[:, None])


Decoded = tuple[int, np.ndarray, np.ndarray, str]
"""(number of the answer, token ids int32 [R], log-probs float32 [R], stop | length)"""


def decode(
    model: Any,
    prompts: Sequence[np.ndarray],
    prompt_of_row: np.ndarray,
    keys: np.ndarray,
    sampling: SamplingParams,
    stop_token_ids: frozenset[int],
) -> Iterator[Decoded | None]:
    """The answers of one batch as they end, by the numbers of their rows. None after each position.

    prompts: Q arrays of token ids; prompt_of_row: int64 [B], which of them each answer belongs to;
    keys: uint64 [B], the rows' random states (`sampling.row_keys`).
    """
    batch = Batch(model, sampling, stop_token_ids)
    batch.add(prompts, prompt_of_row, np.arange(len(prompt_of_row)), keys)
    while len(batch):
        yield from batch.step()
        yield None
