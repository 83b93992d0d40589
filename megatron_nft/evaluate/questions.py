"""Ask an engine questions, grade what comes back, keep one record per question.

The same function serves evaluation inside training (each rank asks its share of the questions) and `megatron-nft eval`.
Legend: Q questions, N answers each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from megatron_nft.engines.answers import GradedAnswer, Verifier, ask_and_grade
from megatron_nft.engines.engine import Completion, Engine, OnWait, Request, SamplingParams
from megatron_nft.evaluate.intervals import score_interval
from megatron_nft.evaluate.statistics import pass_at_k
from megatron_nft.types import Prompt, ReasonKind, Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COUNT_COLUMNS = ("index", "answers", "correct", "unparseable", "no_verdict", "truncated", "tokens")


@dataclass(frozen=True, slots=True)
class Answer:
    """One graded answer."""

    text: str
    num_tokens: int
    finish_reason: str  # stop | length
    verdict: Verdict
    extracted: str | None
    grader_verdicts: dict[str, Verdict] = field(default_factory=dict)  # every grader that was asked
    verify_s: float = 0.0
    reason: str = ""  # why the verdict is none of a comparison, as the grader says it
    reason_kind: ReasonKind | None = None


@dataclass(frozen=True, slots=True)
class QuestionResult:
    """A question and its N answers."""

    index: int  # Prompt.index
    data_source: str
    answers: list[Answer]

    @classmethod
    def of(cls, prompt: Prompt, answers: Sequence[GradedAnswer]) -> QuestionResult:
        """The question with what an engine and the graders said."""
        return cls(prompt.index, prompt.data_source, [_to_answer(answer) for answer in answers])

    @property
    def num_correct(self) -> int:
        return sum(a.verdict is Verdict.CORRECT for a in self.answers)

    def counts(self) -> list[int]:
        """One row in the order of COUNT_COLUMNS."""
        verdicts = [a.verdict for a in self.answers]
        return [
            self.index,
            len(self.answers),
            self.num_correct,
            verdicts.count(Verdict.UNPARSEABLE),
            sum(verdict.is_missing for verdict in verdicts),
            sum(a.finish_reason == "length" for a in self.answers),
            sum(a.num_tokens for a in self.answers),
        ]


@dataclass(frozen=True, slots=True)
class EvalResult:
    """What `evaluate_questions` found, in the order of its prompts."""

    questions: list[QuestionResult]

    def counts(self) -> np.ndarray:
        """int64 [Q, 7], columns COUNT_COLUMNS: small enough to gather from every rank."""
        rows = [q.counts() for q in self.questions]
        return np.array(rows, dtype=np.int64).reshape(len(rows), len(COUNT_COLUMNS))


def evaluate_questions(
    engine: Engine,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    verifier: Verifier,
    *,
    samples: int,
    temperature: float,
    top_p: float,
    max_tokens: int,
    seed: int,
    stop_token_ids: Sequence[int] = (),
    on_answer: Callable[[Completion], None] | None = None,
    on_wait: OnWait | None = None,
    on_question: Callable[[QuestionResult], None] | None = None,
) -> EvalResult:
    """`samples` graded answers to each prompt. Temperature 0 is greedy. stop_token_ids: the tokens that end an answer.

    The seed of an answer depends on `seed`, the prompt's index and the sample number alone, so the split of the prompts
    over ranks does not change it. `on_answer` is called as answers arrive, `on_wait` as engine.OnWait says,
    `on_question` as soon as a question is complete and graded, in no particular order. Where the engine fails, the
    questions that it had finished are graded and reported before its error is raised.
    """
    if samples < 1:
        raise ValueError(f"samples={samples}: at least one answer per question is needed")
    sampling = SamplingParams(max_tokens, temperature, top_p, stop_token_ids=tuple(stop_token_ids))
    requests = [Request(p.token_ids, samples, (seed, p.index)) for p in prompts]
    results: dict[int, QuestionResult] = {}
    for number, answers in ask_and_grade(
        engine,
        prompts,
        requests,
        sampling,
        tokenizer,
        verifier,
        grade_truncated=True,
        on_answer=on_answer,
        on_wait=on_wait,
    ):
        prompt = prompts[number]
        results[number] = QuestionResult.of(prompt, answers)
        if on_question is not None:
            on_question(results[number])
    return EvalResult([results[number] for number in range(len(prompts))])


def _to_answer(answer: GradedAnswer) -> Answer:
    completion, graded = answer.completion, answer.graded
    assert graded is not None, "every answer of an evaluation is graded"
    return Answer(
        text=answer.text,
        num_tokens=len(completion.token_ids),
        finish_reason=completion.finish_reason,
        verdict=graded.verdict,
        extracted=graded.extracted,
        grader_verdicts=dict(graded.by_grader),
        verify_s=graded.seconds,
        reason=graded.reason,
        reason_kind=graded.reason_kind,
    )


def merge_counts(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The ranks' counts as one int64 [Q, 7], by question. ValueError where two ranks asked the same question."""
    merged = np.concatenate([np.asarray(p, dtype=np.int64).reshape(-1, len(COUNT_COLUMNS)) for p in parts])
    merged = merged[np.argsort(merged[:, 0], kind="stable")]
    repeated = merged[1:, 0][merged[1:, 0] == merged[:-1, 0]]
    if len(repeated):
        raise ValueError(f"question {repeated[0]} was evaluated more than once; give each rank its own share")
    return merged


def summarize_counts(counts: np.ndarray) -> dict[str, float]:
    """Return metrics of int64 [Q, 7] for metrics.jsonl: accuracy with its 95 % interval, pass@N, lengths, shares."""
    if len(counts) == 0:
        raise ValueError("no question was evaluated")
    column = dict(zip(COUNT_COLUMNS, counts.T))
    answers = column["answers"].sum()
    accuracy = score_interval(column["correct"] / column["answers"])
    metrics = {
        "accuracy": accuracy.mean,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "length_mean": float(column["tokens"].sum() / answers),
    }
    for name in ("truncated", "unparseable", "no_verdict"):
        metrics[f"{name}_share"] = float(column[name].sum() / answers)
    n = int(column["answers"].min())
    if n > 1:
        metrics[f"pass@{n}"] = float(
            np.mean([pass_at_k(int(a), int(c), n) for a, c in zip(column["answers"], column["correct"])])
        )
    return metrics
