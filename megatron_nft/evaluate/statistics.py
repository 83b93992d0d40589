"""Statistics of evaluations, with their spread. Q questions, N answers each.

Questions are the unit of resampling everywhere: answers to one question are not independent of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

RESAMPLES = 10_000
_CHUNK = 4_000_000  # resampled indices held at a time


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap_means(values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Return float64 [resamples]: means of `values` (float [Q]), Q drawn with replacement. ValueError for Q = 0."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"bootstrap needs a vector of at least one question, not shape {values.shape}")
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(values))
    parts = [
        values[rng.integers(0, len(values), size=(min(rows, resamples - start), len(values)))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(parts)


def bootstrap_interval(
    values: np.ndarray, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Mean of per-question scores [Q] with its percentile bootstrap interval."""
    means = bootstrap_means(values, resamples=resamples, seed=seed)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(np.mean(values)), float(low), float(high))


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """B - A over the same questions."""

    difference: Interval
    share_not_above: float  # share of resamples in which B - A <= 0: a one-sided bootstrap p-value for "B is better"


def paired_bootstrap(
    scores_a: np.ndarray, scores_b: np.ndarray, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> PairedDifference:
    """Mean of B - A with its percentile bootstrap interval.

    scores_a, scores_b: float [Q], per-question scores of two models on the same questions in the same order. ValueError
    where their shapes differ.
    """
    a, b = np.asarray(scores_a, dtype=np.float64), np.asarray(scores_b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired bootstrap needs the same questions: {a.shape} against {b.shape}")
    means = bootstrap_means(b - a, resamples=resamples, seed=seed)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return PairedDifference(Interval(float(np.mean(b - a)), float(low), float(high)), float(np.mean(means <= 0)))


def pass_at_k(num_answers: int, num_correct: int, k: int) -> float:
    """Return the chance that k of the answers, drawn without replacement, hold a correct one: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374), in exact integers.
    """
    if not 0 <= num_correct <= num_answers:
        raise ValueError(f"{num_correct} correct of {num_answers} answers is impossible")
    if not 1 <= k <= num_answers:
        raise ValueError(f"pass@{k} needs 1 <= k <= {num_answers} answers")
    return 1.0 - comb(num_answers - num_correct, k) / comb(num_answers, k)


def majority_at_k(
    votes: Sequence[str | None], correct: Sequence[bool], k: int, *, draws: int = 200, seed: int = 0
) -> float:
    """Return the chance that the most frequent of k answers is correct; ties are broken by a fair draw among the tied.

    `votes` [N] holds each answer's normal form, None where nothing could be read: those do not vote, and k answers
    without a vote are wrong. All correct answers count as one vote whatever their form. With k = N the value is exact,
    else the mean over `draws` random subsets (seeded).
    """
    num = len(votes)
    if len(correct) != num:
        raise ValueError(f"{num} votes but {len(correct)} verdicts")
    if not 1 <= k <= num:
        raise ValueError(f"maj@{k} needs 1 <= k <= {num} answers")
    if k == 1:
        return sum(correct) / num
    forms: dict[str, int] = {}
    ballots = np.array(
        [0 if ok else -1 if v is None else forms.setdefault(v, len(forms) + 1) for v, ok in zip(votes, correct)]
    )  # int [N]: 0 correct, -1 no vote, else one number per wrong form
    if k == num:
        return _majority_correct(ballots)
    rng = np.random.default_rng(seed)
    return float(np.mean([_majority_correct(rng.choice(ballots, size=k, replace=False)) for _ in range(draws)]))


def _majority_correct(ballots: np.ndarray) -> float:
    counts = np.bincount(ballots[ballots >= 0])
    if counts.sum() == 0:
        return 0.0
    top = counts == counts.max()
    return float(top[0]) / float(top.sum())


def powers_of_two(limit: int) -> list[int]:
    """Return 1, 2, 4, ... up to `limit`, which is always the last: powers_of_two(6) = [1, 2, 4, 6]."""
    ks = [1 << i for i in range(limit.bit_length()) if 1 << i <= limit]
    return ks if ks[-1] == limit else [*ks, limit]
