"""The answers of an evaluation on disk: answers/<benchmark>.jsonl, one line per question, written as it finishes.

A line that a killed run left unfinished is cut off when the evaluation goes on; the question is asked again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_nft.evaluate.questions import Answer, QuestionResult
from megatron_nft.types import ReasonKind, Verdict
from megatron_nft.verify.graders import current_name


class RecordError(ValueError):
    """An answer file that cannot be read. The message names file and line."""


class AnswerFile:
    """The answers to one benchmark. Use as a context manager; `done` holds the questions that are there already."""

    def __init__(self, path: Path, num_questions: int, samples: int) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._drop_unfinished_line()
        self.done: dict[int, QuestionResult] = {}
        for number, record in read_answers(self.path):
            result = record.result
            if not 0 <= result.index < num_questions or len(result.answers) != samples:
                raise RecordError(
                    f"{self.path}, line {number}: question {result.index} with {len(result.answers)} answers does not "
                    f"belong to {num_questions} questions with {samples} answers each; use another --out"
                )
            self.done[result.index] = result

    def __enter__(self) -> AnswerFile:
        self._file = self.path.open("ab")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, result: QuestionResult, *, id: str, prompt: str, answer: str) -> None:
        """Write a question with its answers to the file; they are not asked again."""
        line = {
            "index": result.index,
            "id": id,
            "data_source": result.data_source,
            "prompt": prompt,
            "answer": answer,
            "answers": [_answer_to_json(a) for a in result.answers],
        }
        text = json.dumps(line, ensure_ascii=False).replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
        self._file.write(text.encode("utf-8", "replace") + b"\n")
        self._file.flush()
        self.done[result.index] = result

    def results(self) -> list[QuestionResult]:
        """Return the questions that are there, in the order of the benchmark."""
        return [self.done[index] for index in sorted(self.done)]

    def _drop_unfinished_line(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("r+b") as f:
            content = f.read()
            f.truncate(content.rfind(b"\n") + 1)


class AnswerRecord:
    """One line: the question and its graded answers."""

    __slots__ = ("answer", "id", "prompt", "result")

    def __init__(self, line: dict[str, Any]) -> None:
        self.id: str = line["id"]
        self.prompt: str = line["prompt"]
        self.answer: str = line["answer"]
        answers = [_answer_from_json(a) for a in line["answers"]]
        self.result = QuestionResult(line["index"], line["data_source"], answers)


def read_answers(path: Path) -> Iterator[tuple[int, AnswerRecord]]:
    """Yield (line number, record). RecordError for a line that is no record; nothing where the file does not exist."""
    if not Path(path).exists():
        return
    with Path(path).open("rb") as f:
        for number, line in enumerate(f, start=1):
            try:
                yield number, AnswerRecord(json.loads(line.decode("utf-8")))
            except (ValueError, KeyError, TypeError) as e:
                raise RecordError(f"{path}, line {number}: not an answer record ({type(e).__name__}: {e})") from None


def grader_names(results: Sequence[QuestionResult]) -> list[str]:
    """Return the name of every grader that was asked, the deciding one first."""
    return list(dict.fromkeys(name for q in results for a in q.answers for name in a.grader_verdicts))


def _answer_to_json(answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "num_tokens": answer.num_tokens,
        "finish_reason": answer.finish_reason,
        "verdict": str(answer.verdict),
        "extracted": answer.extracted,
        "grader_verdicts": {name: str(verdict) for name, verdict in answer.grader_verdicts.items()},
        "verify_s": answer.verify_s,
        "reason": answer.reason,
        "reason_kind": answer.reason_kind and str(answer.reason_kind),
    }


def _answer_from_json(line: dict[str, Any]) -> Answer:
    return Answer(
        text=line["text"],
        num_tokens=line["num_tokens"],
        finish_reason=line["finish_reason"],
        verdict=Verdict(line["verdict"]),
        extracted=line["extracted"],
        grader_verdicts={current_name(name): Verdict(verdict) for name, verdict in line["grader_verdicts"].items()},
        verify_s=line["verify_s"],
        reason=line.get("reason", ""),  # files of earlier versions lack both
        reason_kind=ReasonKind(kind) if (kind := line.get("reason_kind")) else None,
    )
