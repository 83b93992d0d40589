"""Questions and answers as the page stores them: an index that is read at once, and chunks that are read when needed.

A chunk holds some questions with their answers. It is gzip of: uint32 length of the JSON part | JSON part | per answer
that has tokens, in order, uint32 token ids [R], uint16 -log p under the engine [R] in 1/1000 nats, int16
log p under the trainer - log p under the engine [R] in 1/10000 nats. All numbers are little-endian and saturate;
NO_TRAINER stands where the trainer computed nothing. Formulas in the JSON part are numbers; see formulas.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_nft.report.embed import data_element, to_json
from megatron_nft.report.entries import AnswerEntry, QuestionEntry
from megatron_nft.report.formulas import BLOCK_SIZE, FormulaTable

CHUNK_BYTES = 512 * 1024  # before compression: the cost of opening a question
SNIPPET_CHARS = 140
NO_TRAINER = -32768
LOGPROB_UNIT = 1e-3
GAP_UNIT = 1e-4
MAX_GAP = 20_000  # in GAP_UNIT: 2 nats
MIN_GAP_SCALE = 0.01
VERDICTS = ("correct", "wrong", "unparseable", "timeout", "no_verdict", "not graded")
FLAG_DISAGREE, FLAG_TRUNCATED = 1, 2
GROUP_COLUMNS = ("step", "number", "source", "count", "rate", "chunk", "slot", "text")
ANSWER_COLUMNS = ("verdict", "fate", "length", "flags")
_LATEX = re.compile(r"[\\^_$]")


def _columns(names: Iterable[str]) -> dict[str, list[Any]]:
    return {name: [] for name in names}


@dataclass(slots=True)
class Packer:
    """Packs questions one by one and writes chunks to `out` as they fill up."""

    out: BinaryIO
    num_chunks: int = 0
    formulas: FormulaTable = field(init=False)
    _groups: dict[str, list[Any]] = field(default_factory=lambda: _columns(GROUP_COLUMNS))
    _answers: dict[str, list[Any]] = field(default_factory=lambda: _columns(ANSWER_COLUMNS))
    _names: dict[str, dict[str, int]] = field(default_factory=lambda: {"source": {}, "fate": {}})
    _token_ids: set[int] = field(default_factory=set)
    _gaps: NDArray[np.int64] = field(default_factory=lambda: np.zeros(MAX_GAP + 1, dtype=np.int64))  # count by |gap|
    _json: list[dict[str, Any]] = field(default_factory=list)
    _binary: list[bytes] = field(default_factory=list)
    _size: int = 0

    def __post_init__(self) -> None:
        self.formulas = FormulaTable(self.out)

    def add(self, entries: Iterable[QuestionEntry]) -> None:
        """Pack some questions."""
        for entry in entries:
            self._add_to_index(entry)
            blobs = [self._tokens(answer) for answer in entry.answers]
            part = {
                "prompt": self.formulas.encode(entry.prompt),
                "answer": self.formulas.encode(_as_maths(entry.answer)),
                "answers": [self._answer(answer, bool(blob)) for answer, blob in zip(entry.answers, blobs)],
            }
            self._json.append(part)
            self._binary += blobs
            self._size += sum(map(len, blobs)) + len(entry.prompt) + sum(len(answer.text) for answer in entry.answers)
            if self._size >= CHUNK_BYTES:
                self._flush()

    def index(self) -> dict[str, Any]:
        """Everything that the page's filters need, by column. Call it once, after the last `add`."""
        self._flush()
        self.formulas.flush()
        return {
            "groups": self._groups,
            "answers": self._answers,
            "sources": list(self._names["source"]),
            "fates": list(self._names["fate"]),
            "verdicts": list(VERDICTS),
            "gapScale": self._gap_scale(),
            "formulasPerBlock": BLOCK_SIZE,
        }

    @property
    def token_ids(self) -> list[int]:
        """Every token id that occurs in an answer, in ascending order."""
        return sorted(self._token_ids)

    def _add_to_index(self, entry: QuestionEntry) -> None:
        group = {
            "step": entry.step,
            "number": entry.number,
            "source": self._name("source", entry.source),
            "count": len(entry.answers),
            "rate": round(entry.correct_rate, 4),
            "chunk": self.num_chunks,
            "slot": len(self._json),
            "text": " ".join(entry.prompt[: 4 * SNIPPET_CHARS].split())[:SNIPPET_CHARS],
        }
        for name, value in group.items():
            self._groups[name].append(value)
        for answer in entry.answers:
            truncated = FLAG_TRUNCATED if answer.finish_reason == "length" else 0
            self._answers["verdict"].append(VERDICTS.index(answer.verdict))
            self._answers["fate"].append(self._name("fate", answer.fate))
            self._answers["length"].append(answer.num_tokens)
            self._answers["flags"].append(truncated | (FLAG_DISAGREE if answer.graders_disagree else 0))

    def _answer(self, answer: AnswerEntry, has_tokens: bool) -> dict[str, Any]:
        return {
            "text": self.formulas.encode(answer.text),
            "tokens": answer.num_tokens,
            "finish": answer.finish_reason,
            "verdict": answer.verdict,
            "fate": answer.fate,
            "extracted": answer.extracted,
            "graders": answer.grader_verdicts,
            "version": answer.weight_version,
            "verifyS": round(answer.verify_s, 4),
            "hasTokens": has_tokens,
        }

    def _name(self, kind: str, name: str) -> int:
        return self._names[kind].setdefault(name, len(self._names[kind]))

    def _tokens(self, answer: AnswerEntry) -> bytes:
        """The binary part of one answer; empty where its tokens were not recorded."""
        if answer.token_ids is None or answer.rollout_logprobs is None:
            return b""
        self._token_ids.update(np.unique(answer.token_ids).tolist())
        engine = np.nan_to_num(-answer.rollout_logprobs / LOGPROB_UNIT, nan=0.0, posinf=65535, neginf=0)
        engine = engine.round().clip(0, 65535)
        if answer.trainer_logprobs is None:
            gap = np.full(answer.num_tokens, NO_TRAINER, dtype=np.int64)
        else:
            gap = _gap(answer.trainer_logprobs, answer.rollout_logprobs)
            self._gaps += np.bincount(np.abs(gap), minlength=len(self._gaps))
        columns = (answer.token_ids.astype("<u4"), engine.astype("<u2"), gap.astype("<i2"))
        return b"".join(column.tobytes() for column in columns)

    def _gap_scale(self) -> float:
        """The |log ratio| that gets the full colour: the 99th percentile over all tokens."""
        total = self._gaps.sum()
        if total == 0:
            return MIN_GAP_SCALE
        return max(MIN_GAP_SCALE, float(np.searchsorted(np.cumsum(self._gaps), 0.99 * total)) * GAP_UNIT)

    def _flush(self) -> None:
        if not self._json:
            return
        text = to_json(self._json)
        raw = len(text).to_bytes(4, "little") + text + b"".join(self._binary)
        self.out.write(data_element(f"chunk-{self.num_chunks}", raw))
        self.num_chunks += 1
        self._json, self._binary, self._size = [], [], 0


def _as_maths(reference: str) -> str:
    """A reference answer; in dollars where it is LaTeX without delimiters, as most data sets write it."""
    return f"${reference}$" if _LATEX.search(reference) and "$" not in reference else reference


def _gap(trainer: NDArray[np.float32], engine: NDArray[np.float32]) -> NDArray[np.int64]:
    """int64 [R]: log p under the trainer - log p under the engine in GAP_UNIT, at most MAX_GAP in size."""
    gap = (trainer.astype(np.float64) - engine) / GAP_UNIT
    gap = np.nan_to_num(gap, nan=MAX_GAP, posinf=MAX_GAP, neginf=-MAX_GAP).round().clip(-MAX_GAP, MAX_GAP)
    return np.asarray(gap, dtype=np.int64)
