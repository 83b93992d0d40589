"""Answers packed for the page: an index that is read at once, and chunks that are read when a question is opened.

A chunk is gzip of: uint32 length of the JSON part | JSON part | per answer, in order, uint32 token ids,
uint16 -log p of the engine in 1/1000 nats, int16 log p(trainer) - log p(engine) in 1/10000 nats. All little-endian;
the numbers saturate, and NO_TRAINER stands where the trainer computed nothing.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from megatron_nft.report.entries import AnswerEntry, QuestionEntry

CHUNK_BYTES = 512 * 1024  # before compression: what opening a question costs
SNIPPET_CHARS = 140
NO_TRAINER = -32768
LOGPROB_UNIT = 1e-3
GAP_UNIT = 1e-4
MIN_GAP_SCALE = 0.01
VERDICTS = ("correct", "wrong", "unparseable", "timeout", "not graded")
FLAG_DISAGREE, FLAG_TRUNCATED = 1, 2


@dataclass(slots=True)
class Packer:
    """Writes chunks to `out` as they fill up; `index()` says what is in them."""

    out: BinaryIO
    num_chunks: int = 0
    _groups: dict[str, list] = field(
        default_factory=lambda: {k: [] for k in ("step", "number", "source", "count", "rate", "chunk", "slot", "text")}
    )
    _answers: dict[str, list] = field(default_factory=lambda: {k: [] for k in ("verdict", "fate", "length", "flags")})
    _names: dict[str, dict[str, int]] = field(default_factory=lambda: {"source": {}, "fate": {}})
    _token_ids: set[int] = field(default_factory=set)
    _gaps: np.ndarray = field(default_factory=lambda: np.zeros(20_001, dtype=np.int64))  # histogram of |gap|
    _json: list[dict[str, Any]] = field(default_factory=list)
    _binary: list[bytes] = field(default_factory=list)
    _size: int = 0

    def add(self, entries: Iterable[QuestionEntry]) -> None:
        """Pack some questions."""
        for entry in entries:
            self._index(entry)
            blobs = [_tokens(a) for a in entry.answers]
            for a in entry.answers:
                if a.token_ids is not None:
                    self._token_ids.update(np.unique(a.token_ids).tolist())
                    self._count_gaps(a)
            part = {
                "prompt": entry.prompt,
                "answer": entry.answer,
                "answers": [_answer(a, bool(blob)) for a, blob in zip(entry.answers, blobs)],
            }
            self._json.append(part)
            self._binary += blobs
            self._size += sum(map(len, blobs)) + len(entry.prompt) + sum(len(a.text) for a in entry.answers)
            if self._size >= CHUNK_BYTES:
                self._flush()

    def index(self) -> dict[str, Any]:
        """Everything that filtering needs, by column; call once, after the last `add`."""
        self._flush()
        return {
            "groups": self._groups,
            "answers": self._answers,
            "sources": list(self._names["source"]),
            "fates": list(self._names["fate"]),
            "verdicts": list(VERDICTS),
            "gapScale": self._gap_scale(),
        }

    @property
    def token_ids(self) -> list[int]:
        """Every token id that occurs."""
        return sorted(self._token_ids)

    def _index(self, entry: QuestionEntry) -> None:
        g, a = self._groups, self._answers
        g["step"].append(entry.step)
        g["number"].append(entry.number)
        g["source"].append(self._name("source", entry.source))
        g["count"].append(len(entry.answers))
        g["rate"].append(round(entry.correct_rate, 4))
        g["chunk"].append(self.num_chunks)
        g["slot"].append(len(self._json))
        g["text"].append(" ".join(entry.prompt[: 4 * SNIPPET_CHARS].split())[:SNIPPET_CHARS])
        for answer in entry.answers:
            a["verdict"].append(VERDICTS.index(answer.verdict))
            a["fate"].append(self._name("fate", answer.fate))
            a["length"].append(answer.num_tokens)
            truncated = FLAG_TRUNCATED if answer.finish_reason == "length" else 0
            a["flags"].append(truncated | (FLAG_DISAGREE if answer.graders_disagree else 0))

    def _name(self, kind: str, name: str) -> int:
        return self._names[kind].setdefault(name, len(self._names[kind]))

    def _count_gaps(self, a: AnswerEntry) -> None:
        if a.trainer_logprobs is None:
            return
        gaps = np.abs(_gap(a)).clip(0, len(self._gaps) - 1)
        self._gaps += np.bincount(gaps, minlength=len(self._gaps))

    def _gap_scale(self) -> float:
        """|log ratio| that gets the full colour: the 99th percentile over all tokens."""
        total = self._gaps.sum()
        if total == 0:
            return MIN_GAP_SCALE
        return max(MIN_GAP_SCALE, float(np.searchsorted(np.cumsum(self._gaps), 0.99 * total)) * GAP_UNIT)

    def _flush(self) -> None:
        if not self._json:
            return
        text = json.dumps(self._json, ensure_ascii=False).encode("utf-8", "replace")
        raw = len(text).to_bytes(4, "little") + text + b"".join(self._binary)
        self.out.write(b'<script type="text/plain" id="chunk-%d">' % self.num_chunks)
        self.out.write(encode(raw) + b"</script>\n")
        self.num_chunks += 1
        self._json, self._binary, self._size = [], [], 0


def encode(raw: bytes) -> bytes:
    """gzip, then base64: safe inside a script element whatever the text is."""
    return base64.b64encode(gzip.compress(raw, compresslevel=6, mtime=0))


def _answer(a: AnswerEntry, has_tokens: bool) -> dict[str, Any]:
    return {
        "text": a.text,
        "tokens": a.num_tokens,
        "finish": a.finish_reason,
        "verdict": a.verdict,
        "fate": a.fate,
        "extracted": a.extracted,
        "graders": a.grader_verdicts,
        "version": a.weight_version,
        "verifyS": round(a.verify_s, 4),
        "hasTokens": has_tokens,
    }


def _tokens(a: AnswerEntry) -> bytes:
    """The binary part of one answer; empty where tokens were not recorded."""
    if a.token_ids is None or a.rollout_logprobs is None:
        return b""
    engine = np.nan_to_num(-a.rollout_logprobs / LOGPROB_UNIT, nan=0.0, posinf=65535, neginf=0)
    engine = engine.round().clip(0, 65535)
    gap = np.full(a.num_tokens, NO_TRAINER) if a.trainer_logprobs is None else _gap(a)
    return a.token_ids.astype("<u4").tobytes() + engine.astype("<u2").tobytes() + gap.astype("<i2").tobytes()


def _gap(a: AnswerEntry) -> np.ndarray:
    """int64 [R]: log p(trainer) - log p(engine) in GAP_UNIT, saturated at 2 nats."""
    gap = (a.trainer_logprobs.astype(np.float64) - a.rollout_logprobs) / GAP_UNIT
    return np.nan_to_num(gap, nan=20_000, posinf=20_000, neginf=-20_000).round().clip(-20_000, 20_000).astype(np.int64)
