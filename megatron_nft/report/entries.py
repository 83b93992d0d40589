"""Questions with their answers as the page shows them, and those of the rollout files of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megatron_nft.data.rollout_file import read_rollout_file
from megatron_nft.types import Verdict
from megatron_nft.verify.outcome import graders_disagree

Array: TypeAlias = NDArray[Any]
TOKEN_COLUMNS = ("response_ids", "rollout_logprobs", "trainer_logprobs")


@dataclass(slots=True)
class AnswerEntry:
    """One answer with R tokens. The token arrays are None where they were not recorded."""

    text: str
    num_tokens: int
    finish_reason: str
    verdict: str
    fate: str = ""
    extracted: str | None = None
    grader_verdicts: dict[str, str] = field(default_factory=dict)
    weight_version: int | None = None
    verify_s: float = 0.0
    token_ids: NDArray[np.int32] | None = None  # [R]
    rollout_logprobs: NDArray[np.float32] | None = None  # [R], log p under the engine, nats
    trainer_logprobs: NDArray[np.float32] | None = None  # [R], log p under the trainer, nats

    @property
    def graders_disagree(self) -> bool:
        """Whether one grader calls the answer correct and another does not."""
        return graders_disagree([Verdict(verdict) for verdict in self.grader_verdicts.values()])


@dataclass(slots=True)
class QuestionEntry:
    """One question with its answers."""

    step: int | None  # training step; None in an evaluation
    number: int  # the draw of a run, or the row of a benchmark
    source: str
    prompt: str
    answer: str
    answers: list[AnswerEntry]

    @property
    def correct_rate(self) -> float:
        """Share of correct answers as training counts it: answers that the loss ignores do not count."""
        counted = [answer.verdict == "correct" for answer in self.answers if answer.fate != "ignored"]
        return sum(counted) / len(counted) if counted else 0.0


def rollout_entries(path: Path) -> Iterator[QuestionEntry]:
    """The questions of one rollout file in the order of the file."""
    table = read_rollout_file(path)
    rows = table.select([name for name in table.column_names if name not in (*TOKEN_COLUMNS, "prompt_ids")]).to_pylist()
    tokens = zip(*(_arrays(table.column(name)) for name in TOKEN_COLUMNS))
    for _, answers in groupby(zip(rows, tokens), key=lambda pair: pair[0]["draw"]):
        yield _question(list(answers))


def _question(rows: list[tuple[dict[str, Any], tuple[Array | None, ...]]]) -> QuestionEntry:
    """One question from the rows of its answers, each with its arrays in the order of TOKEN_COLUMNS."""
    first = rows[0][0]
    answers = [
        AnswerEntry(
            text=row["text"],
            num_tokens=0 if ids is None else len(ids),
            finish_reason=row["finish_reason"],
            verdict=row["verdict"] or "not graded",
            fate=row["fate"],
            extracted=row["extracted"],
            grader_verdicts=json.loads(row["grader_verdicts"]) if row["grader_verdicts"] else {},
            weight_version=row["weight_version"],
            verify_s=row["verify_s"],
            token_ids=ids,
            rollout_logprobs=engine,
            trainer_logprobs=trainer,
        )
        for row, (ids, engine, trainer) in rows
    ]
    return QuestionEntry(
        first["step"], first["draw"], first["data_source"], first["prompt_text"], first["answer"], answers
    )


def _arrays(column: pa.ChunkedArray) -> list[Array | None]:
    """Each row of a list column as a NumPy array; None for null."""
    found: list[Array | None] = []
    for chunk in column.chunks:
        values, offsets = chunk.values.to_numpy(zero_copy_only=False), chunk.offsets.to_numpy()
        valid = chunk.is_valid().to_numpy(zero_copy_only=False)
        found += [values[start:end] if ok else None for start, end, ok in zip(offsets, offsets[1:], valid)]
    return found
