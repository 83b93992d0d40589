"""95 % intervals of evaluations, and whether two models differ. Q questions, N answers each.

Questions are the unit everywhere: answers to one question are not independent of each other. What is estimated is the
mean over the questions that a benchmark could have had. All quantiles are Student's with Q - 1 degrees of freedom,
which matters below a hundred questions. benchmarks/intervals.py shows by simulation how often the intervals hold the
truth; docs/results.md has its table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf, sqrt

import mpmath
import numpy as np

LEVEL = 0.95

PRIOR_SPREAD = 0.05
"""Added to the measured sum of squares and to the largest possible one. It pulls the design effect towards 1, its
largest value, where next to nothing was right (or wrong) and few questions hide the spread. Found by simulation."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def score_interval(scores: np.ndarray) -> Interval:
    """Return the mean of per-question scores (float [Q], each in [0, 1]) with its interval.

    The mean is studentized with the spread that it would have at each possible truth p, and the p whose statistic is
    within Student's quantile make up the interval: Wilson's interval (1927) for Q / d questions, where the design
    effect d = s^2 / (mean (1 - mean)) is 1 for single answers and less for means of several (Korn and Graubard 1998).
    Unlike mean +- t s / sqrt(Q) it stays within [0, 1], is wider towards the middle, and says something where all
    scores are 0. ValueError for Q = 0.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"an interval needs a vector of at least one question, not shape {scores.shape}")
    questions, mean = len(scores), float(scores.mean())
    if questions == 1:
        return Interval(mean, 0.0, 1.0)
    unbiased = questions / (questions - 1)
    spread = float(np.square(scores - mean).sum()) * unbiased
    largest = questions * mean * (1 - mean) * unbiased  # the spread if every question were fully right or wrong
    effect = (spread + PRIOR_SPREAD) / (largest + PRIOR_SPREAD)
    x = t_quantile(questions - 1) ** 2 * effect / questions
    middle, half = mean + x / 2, sqrt(x * mean * (1 - mean) + x * x / 4)
    low, high = (middle - half) / (1 + x), (middle + half) / (1 + x)
    return Interval(mean, max(0.0, min(low, mean)), min(1.0, max(high, mean)))


def average_interval(intervals: Sequence[Interval]) -> Interval:
    """Return the mean of independent means with its interval, from theirs (Zou and Donner 2008, "MOVER").

    Each side adds up like standard errors: mean - low = sqrt(sum (mean_i - low_i)^2) / n.
    """
    n = len(intervals)
    mean = sum(i.mean for i in intervals) / n
    low = sqrt(sum((i.mean - i.low) ** 2 for i in intervals)) / n
    high = sqrt(sum((i.high - i.mean) ** 2 for i in intervals)) / n
    return Interval(mean, mean - low, mean + high)


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """B - A over the same questions."""

    difference: Interval
    std_error: float
    degrees: float  # of freedom; 0 for a single question, which tells nothing
    p_value: float  # two-sided: how often equal models differ as much or more


def paired_difference(scores_a: np.ndarray, scores_b: np.ndarray) -> PairedDifference:
    """Return the mean of B - A with its t-interval.

    scores_a, scores_b: float [Q], per-question scores of two models on the same questions in the same order. The spread
    counts one further question without a difference: a few questions that happen to differ alike are no certainty.
    ValueError where the shapes differ, or for Q = 0.
    """
    a, b = np.asarray(scores_a, dtype=np.float64), np.asarray(scores_b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(f"a paired difference needs the same questions, at least one: {a.shape} against {b.shape}")
    values, questions = b - a, len(a)
    std_error = float(np.std(np.append(values, 0.0), ddof=1)) / sqrt(questions)
    return _tested(float(values.mean()), std_error, questions - 1)


def average_difference(differences: Sequence[PairedDifference]) -> PairedDifference:
    """Return the mean of independent differences, with Welch and Satterthwaite's degrees of freedom."""
    n = len(differences)
    variances = [d.std_error**2 for d in differences]
    parts = [v * v / d.degrees if d.degrees else inf for v, d in zip(variances, differences) if v]
    degrees = sum(variances) ** 2 / sum(parts) if parts else float(sum(d.degrees for d in differences))
    return _tested(sum(d.difference.mean for d in differences) / n, sqrt(sum(variances)) / n, degrees)


def _tested(mean: float, std_error: float, degrees: float) -> PairedDifference:
    if not degrees:
        return PairedDifference(Interval(mean, -1.0, 1.0), std_error, 0, 1.0)
    half = t_quantile(degrees) * std_error
    p_value = two_sided_p(mean / std_error, degrees) if std_error else 1.0  # no question differs
    return PairedDifference(Interval(mean, max(-1.0, mean - half), min(1.0, mean + half)), std_error, degrees, p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values corrected for their number (Holm 1979), in their order.

    With those below 0.05 called differences, equal models differ anywhere among n comparisons in 5 % of cases.
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def two_sided_p(t: float, degrees: float) -> float:
    """Return P(|T| >= |t|) of Student's distribution."""
    return float(mpmath.betainc(degrees / 2, 0.5, 0, degrees / (degrees + t * t), regularized=True))


@lru_cache(maxsize=256)
def t_quantile(degrees: float) -> float:
    """Return the t with P(|T| < t) = 95 % of Student's distribution: 2.045 for 29 degrees of freedom, 12.71 for 1."""
    low, high = 1.0, 1e6
    while high - low > 1e-9 * low:
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, degrees) > 1 - LEVEL else (low, middle)
    return low
