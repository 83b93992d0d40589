"""Figures against values worked out by hand or by enumeration."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_nft.evaluate.statistics import majority_at_k, pass_at_k, powers_of_two


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
