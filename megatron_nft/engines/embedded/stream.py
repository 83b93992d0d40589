"""Answers of the embedded engine that come and go one by one: see `engine.AnswerStream`.

What is decoded together, and when an answer starts and ends, hangs on the requests and the calls alone, so that a run
that is repeated from the same state makes the same tokens, bit for bit. Keys and values live as long as the stream: an
answer that goes on from a prefix has all of them computed anew, under the weights that it goes on with.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Self

import numpy as np

from megatron_nft.engines.completions import joined
from megatron_nft.engines.embedded.decode import Batch, Decoded, row_width
from megatron_nft.engines.embedded.sampling import row_keys
from megatron_nft.engines.engine import Advance, AnswerRequest, Completion, SamplingParams

ROUNDS_PER_ANSWER = 64
"""Calls of `advance` for the longest answer: between two of them answers join, and the caller sees those that ended."""


class EmbeddedStream:
    """See `engine.AnswerStream`."""

    def __init__(self, batch: Batch, sampling: SamplingParams, version: int, *, batch_tokens: int, limit: int) -> None:
        """batch_tokens: rows x tokens of the longest possible row that may be decoded at once. limit: of the model."""
        self._batch, self._version, self._max_tokens = batch, version, sampling.max_tokens
        self._batch_tokens, self._limit = batch_tokens, limit
        self._tokens_per_round = -(-sampling.max_tokens // ROUNDS_PER_ANSWER)
        self._waiting: deque[AnswerRequest] = deque()
        self._started: dict[int, AnswerRequest] = {}

    def add(self, requests: Sequence[AnswerRequest]) -> None:
        """See `engine.AnswerStream.add`. ValueError for a prompt that leaves no room for the longest answer."""
        for request in requests:
            row_width(len(request.prompt_ids), self._max_tokens, self._limit)
        self._waiting.extend(requests)

    def advance(self, *, at_once: bool = False) -> Advance:
        """See `engine.AnswerStream.advance`. Between two calls nothing happens that could be told at once."""
        ended: list[Decoded] = []
        if at_once:
            return Advance([], False)
        self._start()
        for _ in range(self._tokens_per_round):
            if len(self._batch):
                ended += self._batch.step()
        return Advance([self._close(answer) for answer in ended], True)

    def interrupt(self) -> None:
        """See `engine.AnswerStream.interrupt`. No answer is under way beside the caller, who gets all from `stop`."""

    def stop(self) -> list[tuple[int, Completion]]:
        """See `engine.AnswerStream.stop`."""
        stopped = [self._close(answer) for answer in self._batch.under_way()]
        waiting = [(request.number, request.prefix) for request in self._waiting if request.prefix is not None]
        self._waiting.clear()
        return [(number, answer) for number, answer in stopped if len(answer.token_ids)] + waiting

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.clear()
        self._started.clear()

    def _start(self) -> None:
        """Begin those that there is room for, one at the least."""
        new: list[AnswerRequest] = []
        longest = max((len(request.prompt_ids) for request in self._started.values()), default=0)
        while self._waiting:
            longest = max(longest, len(self._waiting[0].prompt_ids))
            rows = len(self._batch) + len(new)
            if rows and (rows + 1) * (longest + self._max_tokens) > self._batch_tokens:
                break
            new.append(self._waiting.popleft())
        if not new:
            return
        prefixes = [_tokens_of(request.prefix) for request in new]
        sequences = [np.concatenate([r.prompt_ids, ids]).astype(np.int32) for r, (ids, _) in zip(new, prefixes)]
        places: dict[bytes, int] = {}  # answers to one question begin with the same tokens, which are read once
        place_of_row = [places.setdefault(sequence.tobytes(), len(places)) for sequence in sequences]
        distinct = [sequences[place_of_row.index(place)] for place in range(len(places))]
        self._batch.add(
            distinct,
            np.array(place_of_row, dtype=np.int64),
            np.array([request.number for request in new], dtype=np.int64),
            row_keys(request.seed_key for request in new),
            prefixes,
        )
        self._started |= {request.number: request for request in new}

    def _close(self, answer: Decoded) -> tuple[int, Completion]:
        number, token_ids, logprobs, reason = answer
        prefix = self._started.pop(number).prefix
        start = len(_tokens_of(prefix)[0])
        rest = Completion(token_ids[start:], logprobs[start:], reason or "stopped", self._version)
        return number, joined(prefix, rest)


def _tokens_of(prefix: Completion | None) -> tuple[np.ndarray, np.ndarray]:
    if prefix is None:
        return np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32)
    return prefix.token_ids, prefix.logprobs
