"""Intervals against printed tables, values worked out by hand, and the truth of simulated evaluations."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from megatron_nft.evaluate.intervals import (
    Interval,
    average_difference,
    average_interval,
    holm,
    paired_difference,
    score_interval,
    t_quantile,
    two_sided_p,
)

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "intervals.py"


@pytest.fixture(scope="module")
def simulation():
    spec = importlib.util.spec_from_file_location("intervals_benchmark", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("degrees", "t"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (29, 2.045), (99, 1.984), (499, 1.965)]
)
def test_quantiles_are_those_of_printed_tables(degrees, t):
    assert t_quantile(degrees) == pytest.approx(t, abs=5e-4)
    assert two_sided_p(t, degrees) == pytest.approx(0.05, abs=1e-4)
    assert two_sided_p(-t, degrees) == two_sided_p(t, degrees)


@pytest.mark.parametrize(
    ("right", "questions", "low", "high"),
    # Wilson's limits for `right` of `questions` with t in place of 1.96: (p + x/2 -+ sqrt(x p (1-p) + x^2/4)) / (1 + x)
    # with x = t^2 / questions, worked out apart from the code.
    [
        (0, 30, 0.0, 0.12237),
        (3, 30, 0.03315, 0.26475),
        (15, 30, 0.32509, 0.67491),
        (120, 200, 0.53041, 0.66578),
        (500, 500, 0.99234, 1.0),
    ],
)
def test_single_answers_have_the_interval_of_wilson(right, questions, low, high):
    interval = score_interval(np.array([1.0] * right + [0.0] * (questions - right)))
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-5)
    assert interval.mean == right / questions


def test_several_answers_narrow_it_by_their_design_effect():
    """Twenty questions at 0.4 and twenty at 0.6: variance 0.01 of at most 0.25, so n = 40 / 0.04 nearly."""
    interval = score_interval(np.array([0.4, 0.6] * 20))
    effect = (40 * 0.01 * 40 / 39 + 0.05) / (40 * 0.25 * 40 / 39 + 0.05)
    assert interval.high - interval.low == pytest.approx(2 * 2.0227 * np.sqrt(0.25 * effect / 40), rel=0.01)


def test_what_few_or_equal_questions_cannot_tell():
    assert score_interval(np.array([0.3])) == Interval(0.3, 0.0, 1.0)
    zeros, ones = score_interval(np.zeros(9)), score_interval(np.ones(9))
    assert (zeros.low, zeros.high) == pytest.approx((1 - ones.high, 1 - ones.low)) and zeros.high > 0.3
    equal = score_interval(np.full(9, 0.25))
    assert equal.low < 0.25 < equal.high
    for wrong in (np.array([]), np.zeros((2, 2))):
        with pytest.raises(ValueError, match="at least one question"):
            score_interval(wrong)


def test_an_average_adds_each_side_up():
    """Sides of 3 and 4 points downwards and 6 and 8 upwards become 5 / 2 and 10 / 2."""
    got = average_interval([Interval(0.2, 0.17, 0.26), Interval(0.4, 0.36, 0.48)])
    assert (got.mean, got.low, got.high) == pytest.approx((0.3, 0.275, 0.35))
    assert average_interval([Interval(0.2, 0.17, 0.26)]) == Interval(0.2, pytest.approx(0.17), pytest.approx(0.26))


def test_a_paired_difference_by_hand():
    """Differences 0.5, 0.5, 0, 0, 0: mean 0.2; with one more 0 the squares are 0.5 - 1 / 6 = 1 / 3, over 5."""
    d = paired_difference(np.zeros(5), np.array([0.5, 0.5, 0, 0, 0]))
    assert (d.difference.mean, d.std_error, d.degrees) == (pytest.approx(0.2), pytest.approx((1 / 75) ** 0.5), 4)
    half = 2.7764 * (1 / 75) ** 0.5
    assert (d.difference.low, d.difference.high) == pytest.approx((0.2 - half, 0.2 + half), abs=1e-4)
    assert d.p_value == pytest.approx(0.158, abs=1e-3)  # t = 1.7321 at 4 degrees of freedom


@pytest.mark.parametrize(("questions", "told"), [(2, False), (3, False), (4, True), (40, True)])
def test_two_or_three_questions_that_differ_alike_are_no_certainty(questions, told):
    """The error is d / sqrt(Q (Q + 1)): for three t = sqrt(12) = 3.5 is below 4.3, for four sqrt(20) above 3.2."""
    d = paired_difference(np.zeros(questions), np.full(questions, 0.25))
    assert (d.p_value < 0.05) is told
    assert (d.difference.low > 0) is told


def test_pairing_removes_the_spread_that_questions_share():
    a = np.random.default_rng(0).random(200) * 0.9
    paired = paired_difference(a, a + 0.05)  # every question 5 points better
    assert paired.difference.mean == pytest.approx(0.05)
    assert paired.difference.low > 0.049 and paired.p_value < 1e-6
    assert score_interval(a + 0.05).low < score_interval(a).high  # unpaired intervals overlap


def test_models_that_do_not_differ_are_not_told_apart():
    same = paired_difference(np.full(30, 0.5), np.full(30, 0.5))
    assert (same.difference, same.p_value) == (Interval(0.0, 0.0, 0.0), 1.0)
    swapped = paired_difference(np.array([0.0, 1.0] * 50), np.array([1.0, 0.0] * 50))
    assert swapped.difference.low < 0 < swapped.difference.high and swapped.p_value == 1.0
    one = paired_difference(np.zeros(1), np.ones(1))
    assert (one.difference.low, one.difference.high, one.p_value) == (-1.0, 1.0, 1.0)
    for left, right in ((np.zeros(3), np.zeros(2)), (np.zeros(0), np.zeros(0))):
        with pytest.raises(ValueError, match="same questions"):
            paired_difference(left, right)


def test_the_average_of_differences_by_hand():
    """Standard errors 0.03 and 0.04 at 9 and 4 degrees: 0.05 / 2, and Welch's 25^2 / (81 / 9 + 256 / 4) = 8.56."""
    first = paired_difference(np.zeros(10), np.zeros(10))
    made = [
        type(first)(Interval(0.1, 0, 0), 0.03, 9, 1.0),
        type(first)(Interval(0.2, 0, 0), 0.04, 4, 1.0),
    ]
    got = average_difference(made)
    assert (got.difference.mean, got.std_error, got.degrees) == pytest.approx((0.15, 0.025, 625 / 73))
    assert got.p_value == pytest.approx(two_sided_p(6.0, 625 / 73))
    assert average_difference([first, first]).p_value == 1.0
    assert average_difference([first, made[0]]).degrees == pytest.approx(9)
    unknown = paired_difference(np.zeros(1), np.ones(1))  # a benchmark of one question tells nothing
    assert average_difference([unknown, made[0]]).p_value == 1.0


@pytest.mark.parametrize(
    ("given", "corrected"),
    [
        ([0.01], [0.01]),
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.04, 0.04], [0.08, 0.08]),
        ([0.001, 0.02, 0.03, 0.9], [0.004, 0.06, 0.06, 0.9]),
        ([0.9, 0.8], [1.0, 1.0]),
        ([], []),
    ],
)
def test_holm_by_hand(given, corrected):
    assert holm(given) == pytest.approx(corrected)


def test_holm_keeps_six_benchmarks_of_equal_models_below_five_percent(simulation):
    """Uncorrected, one of six would seem to differ in 26 % of comparisons."""
    rng = np.random.default_rng(3)
    p_values = rng.random((2000, 6))
    assert 0.03 < np.mean([min(holm(p)) <= 0.05 for p in p_values]) < 0.065
    assert np.mean(p_values.min(axis=1) <= 0.05) > 0.2


@pytest.mark.parametrize(
    ("mean", "concentration", "bootstrap_at_most"), [(0.03, 1, 0.80), (0.03, 4, 0.88), (0.13, 1, 0.925)]
)
def test_thirty_questions_are_covered_where_the_percentile_bootstrap_fails(
    simulation, mean, concentration, bootstrap_at_most
):
    scores, _ = simulation.simulate(1200, 30, 32, mean, concentration)
    assert simulation.coverage(simulation.ours, scores, mean) >= 0.93  # 95 % less 3 standard errors
    assert simulation.coverage(simulation.percentile_bootstrap, scores, mean) <= bootstrap_at_most


def test_equal_models_are_rarely_told_apart_where_the_percentile_bootstrap_tells_them(simulation):
    a, b = simulation.simulate(1200, 10, 32, 0.5, 1)
    assert 1 - simulation.coverage(simulation.ours_paired, b - a, 0.0) <= 0.065  # 5 % and 2.4 standard errors
    assert 1 - simulation.coverage(simulation.percentile_bootstrap, b - a, 0.0) >= 0.085


@pytest.mark.long
@pytest.mark.parametrize("concentration", [1, 4])
@pytest.mark.parametrize(
    ("questions", "answers", "mean"), [(q, n, p) for q, n in ((30, 32), (500, 1)) for p in (0.03, 0.13, 0.5)]
)
def test_coverage_and_equal_models_over_ten_thousand_draws(simulation, questions, answers, mean, concentration):
    a, b = simulation.simulate(10_000, questions, answers, mean, concentration)
    assert 0.93 <= simulation.coverage(simulation.ours, a, mean) <= (0.98 if mean == 0.03 else 0.97)
    assert 1 - simulation.coverage(simulation.ours_paired, b - a, 0.0) <= 0.055
