"""The figures of an evaluation. Q questions, N answers each. Their intervals are in intervals.py."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np


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

    An upper bound: correct answers are one vote whatever their form, wrong ones are only where their forms are equal.

    `votes` [N] holds each answer's normal form, None where nothing could be read: those do not vote, and k answers
    without a vote are wrong. With k = N the value is exact,
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
