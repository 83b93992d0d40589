"""From graded answers to the metrics of a benchmark. Q questions, N answers each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from megatron_nft.evaluate.intervals import Interval, average_interval, score_interval
from megatron_nft.evaluate.questions import QuestionResult
from megatron_nft.evaluate.records import grader_names
from megatron_nft.evaluate.statistics import majority_at_k, pass_at_k, powers_of_two
from megatron_nft.types import Verdict
from megatron_nft.verify.outcome import graders_disagree


def benchmark_metrics(results: Sequence[QuestionResult]) -> dict[str, Any]:
    """Return what is reported of one benchmark; with 95 % intervals over questions. ValueError for none."""
    if not results:
        raise ValueError("no question was answered")
    samples = len(results[0].answers)
    answers = [a for q in results for a in q.answers]
    lengths = np.array([a.num_tokens for a in answers])
    ks = powers_of_two(samples)
    return {
        "questions": len(results),
        "samples": samples,
        "accuracy": asdict(score_interval(question_scores(results))),
        "pass_at": {str(k): asdict(_over_questions(results, lambda q, k=k: _pass(q, k))) for k in ks},
        "majority_at": {str(k): asdict(_over_questions(results, lambda q, k=k: _majority(q, k))) for k in ks},
        "length": {
            "mean": float(lengths.mean()),
            "median": float(np.median(lengths)),
            "p95": float(np.percentile(lengths, 95)),
            "max": int(lengths.max()),
        },
        "truncated_share": float(np.mean([a.finish_reason == "length" for a in answers])),
        "verdict_shares": {v.value: float(np.mean([a.verdict is v for a in answers])) for v in Verdict},
        "graders": _graders(results),
        "seconds_per_verdict": float(np.mean([a.verify_s for a in answers])),
    }


def question_scores(results: Sequence[QuestionResult], grader: str | None = None) -> np.ndarray:
    """Return float64 [Q]: share of correct answers per question, by the deciding verdict or by one grader's."""
    verdicts = [[a.verdict if grader is None else a.grader_verdicts.get(grader) for a in q.answers] for q in results]
    return np.array([np.mean([v is Verdict.CORRECT for v in of_question]) for of_question in verdicts])


def macro_average(scores: Mapping[str, np.ndarray]) -> Interval:
    """Return the mean of the benchmarks' accuracies with its 95 % interval. scores: float [Q] of each benchmark."""
    return average_interval([score_interval(s) for s in scores.values()])


def vote_form(extracted: str | None) -> str | None:
    """Return the extracted answer without its layout: equal forms count as the same vote, and None does not vote."""
    if extracted is None:
        return None
    text = re.sub(r"\\[dt]frac", r"\\frac", extracted)
    text = re.sub(r"\\left|\\right|\\[,;!: ]|[\s$]", "", text)
    return text.rstrip(".") or None


def _graders(results: Sequence[QuestionResult]) -> dict[str, Any]:
    """Accuracy by each grader that was asked, and how often it and the deciding one disagree on `correct`."""
    names = grader_names(results)
    answers = [a for q in results for a in q.answers]
    out = {}
    for name in names:
        differ = [graders_disagree([a.verdict, a.grader_verdicts.get(name, Verdict.NO_VERDICT)]) for a in answers]
        out[name] = {
            "accuracy": asdict(score_interval(question_scores(results, name))),
            "disagrees_share": float(np.mean(differ)),
            "verdict_shares": {
                v.value: float(np.mean([a.grader_verdicts.get(name) is v for a in answers])) for v in Verdict
            },
        }
    return out


def _over_questions(results: Sequence[QuestionResult], score: Any) -> Interval:
    return score_interval(np.array([score(q) for q in results]))


def _pass(result: QuestionResult, num_draws: int) -> float:
    return pass_at_k(len(result.answers), result.num_correct, num_draws)


def _majority(result: QuestionResult, num_draws: int) -> float:
    votes = [vote_form(answer.extracted) for answer in result.answers]
    correct = [answer.verdict is Verdict.CORRECT for answer in result.answers]
    return majority_at_k(votes, correct, num_draws, seed=result.index)
