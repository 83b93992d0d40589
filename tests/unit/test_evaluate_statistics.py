"""Figures against values worked out by hand, by enumeration or by the normal approximation."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_nft.evaluate.statistics import (
    bootstrap_interval,
    majority_at_k,
    paired_bootstrap,
    pass_at_k,
    powers_of_two,
)


def test_bootstrap_matches_the_normal_approximation():
    values = np.array([1.0] * 120 + [0.0] * 80)
    interval = bootstrap_interval(values)
    half_width = 1.96 * np.sqrt(0.6 * 0.4 / 200)  # 0.0679
    assert interval.mean == pytest.approx(0.6)
    assert interval.low == pytest.approx(0.6 - half_width, abs=0.006)
    assert interval.high == pytest.approx(0.6 + half_width, abs=0.006)


def coverage(trials: int, questions: int, rate: float) -> float:
    """Share of simulated evaluations whose interval holds the true rate."""
    rng = np.random.default_rng(7)
    hits = 0
    for trial in range(trials):
        interval = bootstrap_interval((rng.random(questions) < rate).astype(float), resamples=800, seed=trial)
        hits += interval.low <= rate <= interval.high
    return hits / trials


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    assert 0.91 <= coverage(300, 150, 0.4) <= 0.985  # 95 % +- 3 standard errors of 300 trials


@pytest.mark.long
@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
def test_bootstrap_of_500_questions_covers_the_truth_closely(rate):
    assert 0.93 <= coverage(3000, 500, rate) <= 0.97  # a standard error of 3000 trials is 0.4 %


def test_bootstrap_is_reproducible_and_refuses_nothing_to_resample():
    values = np.linspace(0, 1, 37)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    with pytest.raises(ValueError, match="at least one question"):
        bootstrap_interval(np.array([]))


def test_constant_scores_have_no_spread():
    interval = bootstrap_interval(np.full(9, 0.25))
    assert (interval.mean, interval.low, interval.high) == (0.25, 0.25, 0.25)


def test_pairing_removes_the_spread_that_questions_share():
    rng = np.random.default_rng(0)
    a = rng.random(200)
    b = a + 0.05  # every question 5 points better
    paired = paired_bootstrap(a, b)
    assert paired.difference.mean == pytest.approx(0.05)
    assert paired.difference.high - paired.difference.low < 1e-9
    assert paired.share_not_above == 0.0
    assert bootstrap_interval(b).low < bootstrap_interval(a).high  # unpaired intervals overlap


def test_paired_bootstrap_of_equal_models_says_nothing():
    a = np.array([0.0, 1.0] * 50)
    b = a[::-1].copy()  # the same accuracy, every question changed
    paired = paired_bootstrap(a, b)
    assert paired.difference.low < 0 < paired.difference.high
    assert 0.4 < paired.share_not_above < 0.6
    with pytest.raises(ValueError, match="same questions"):
        paired_bootstrap(a, b[:-1])


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)  # only 1 of 6 pairs holds no correct answer
    assert pass_at_k(32, 8, 1) == pytest.approx(0.25)
    assert pass_at_k(5, 0, 5) == 0.0
    assert pass_at_k(5, 1, 5) == 1.0


@given(st.integers(1, 7), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_answer(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_refuses_the_impossible(n, c, k):
    with pytest.raises(ValueError):
        pass_at_k(n, c, k)


def test_majority_by_hand():
    assert majority_at_k(["7", "7", "8"], [True, True, False], 3) == 1.0
    assert majority_at_k(["7", "8", "8"], [True, False, False], 3) == 0.0
    assert majority_at_k(["7", "7", "8", "8", "9"], [True, True, False, False, False], 5) == 0.5  # tie of two
    assert majority_at_k(["0.5", "1/2", "8", "9"], [True, True, False, False], 4) == 1.0  # one vote in two forms
    assert majority_at_k([None, None, "7"], [False, False, True], 3) == 1.0  # the unreadable do not vote
    assert majority_at_k([None, None], [False, False], 2) == 0.0
    assert majority_at_k(["7", "8", "8", "8"], [True, False, False, False], 1) == 0.25


def test_majority_of_subsets_approaches_the_enumeration():
    votes, correct = ["a", "a", "a", "b", "b", "c"], [True, True, True, False, False, False]

    def winner(subset):  # written out on its own: counts per form, ties shared
        forms = [votes[i] for i in subset]
        counts = {f: forms.count(f) for f in forms}
        top = [f for f, n in counts.items() if n == max(counts.values())]
        return ("a" in top) / len(top)

    exact = np.mean([winner(s) for s in combinations(range(6), 3)])
    assert majority_at_k(votes, correct, 3, draws=4000) == pytest.approx(exact, abs=0.03)


def test_powers_of_two_end_at_the_limit():
    assert powers_of_two(1) == [1]
    assert powers_of_two(6) == [1, 2, 4, 6]
    assert powers_of_two(32) == [1, 2, 4, 8, 16, 32]
