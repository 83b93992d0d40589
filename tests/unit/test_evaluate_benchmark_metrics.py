"""Figures of a benchmark against values counted by hand."""

import numpy as np
import pytest

from megatron_nft.evaluate.benchmark_metrics import benchmark_metrics, macro_average, question_scores, vote_form
from megatron_nft.evaluate.questions import Answer, QuestionResult
from megatron_nft.evaluate.summary import NOTE, tables
from megatron_nft.types import Verdict

C, W, U, T = Verdict.CORRECT, Verdict.WRONG, Verdict.UNPARSEABLE, Verdict.TIMEOUT


def question(index, *answers):
    """answers: (verdict, extracted, tokens, finish reason, strict grader's verdict)"""
    return QuestionResult(
        index, "sums", [Answer("t", n, f, v, x, {"loose": v, "strict": s}, 0.5) for v, x, n, f, s in answers]
    )


RESULTS = [
    question(0, (C, "7", 10, "stop", C), (C, "7.", 20, "stop", W), (W, "8", 30, "stop", W), (U, None, 40, "length", U)),
    question(1, (W, "1", 10, "stop", W), (W, "1", 10, "stop", C), (T, "9^9", 10, "stop", W), (C, "2", 70, "length", C)),
]


def test_figures_by_hand():
    f = benchmark_metrics(RESULTS)
    assert (f["questions"], f["samples"]) == (2, 4)
    assert f["accuracy"]["mean"] == pytest.approx(3 / 8)
    # Scores 0.5 and 0.25, t = 12.706: effect (0.0625 + 0.05) / (0.9375 + 0.05), x = 9.1964 (intervals.py).
    assert (f["accuracy"]["low"], f["accuracy"]["high"]) == pytest.approx((0.01435, 0.96113), abs=1e-4)
    # pass@2: 1 - C(2,2)/C(4,2) = 5/6 and 1 - C(3,2)/C(4,2) = 1/2
    assert {k: v["mean"] for k, v in f["pass_at"].items()} == pytest.approx(
        {"1": 3 / 8, "2": (5 / 6 + 1 / 2) / 2, "4": 1.0}
    )
    # maj@4: two votes for 7 against one for 8; two for 1 against one each: right and wrong
    assert f["majority_at"]["4"]["mean"] == pytest.approx(0.5)
    assert f["majority_at"]["1"]["mean"] == pytest.approx(3 / 8)
    assert f["length"] == pytest.approx({"mean": 25.0, "median": 15.0, "p95": 59.5, "max": 70})
    assert f["truncated_share"] == pytest.approx(2 / 8)
    assert f["verdict_shares"] == pytest.approx(
        {"correct": 3 / 8, "wrong": 3 / 8, "unparseable": 1 / 8, "timeout": 1 / 8, "no_verdict": 0}
    )
    assert f["seconds_per_verdict"] == 0.5


def test_graders_side_by_side():
    graders = benchmark_metrics(RESULTS)["graders"]
    assert list(graders) == ["loose", "strict"]
    assert graders["loose"]["accuracy"]["mean"] == pytest.approx(3 / 8)
    assert graders["loose"]["disagrees_share"] == 0.0
    assert graders["strict"]["accuracy"]["mean"] == pytest.approx(3 / 8)  # as many, but not the same ones
    assert graders["strict"]["disagrees_share"] == pytest.approx(2 / 8)


def test_the_majority_is_called_an_upper_bound():
    """Two right forms are one vote, two wrong forms of one value are two: 1/2 and 0.5 against 7 and 7.0."""
    votes = (C, "1/2", 1, "stop", C), (C, "0.5", 1, "stop", C), (W, "7", 1, "stop", W), (W, "7.0", 1, "stop", W)
    figures = benchmark_metrics([question(0, *votes), question(1, *votes)])
    assert figures["majority_at"]["4"]["mean"] == 1.0
    results = {"benchmarks": {"x": figures | {"over_long_prompts": 0}}, "average": None}
    shown = dict(tables(results))
    assert "maj@N %, at most" in shown["Accuracy"][0]
    assert "Majority of k answers (upper bound)" in shown and "upper bounds" in NOTE


def test_one_answer_per_question_has_only_k_of_one():
    f = benchmark_metrics([question(0, (C, "7", 10, "stop", C)), question(1, (W, "7", 10, "stop", C))])
    assert list(f["pass_at"]) == list(f["majority_at"]) == ["1"]
    with pytest.raises(ValueError, match="no question"):
        benchmark_metrics([])


def test_macro_average_weighs_benchmarks_alike():
    small, large = np.array([1.0, 1.0]), np.zeros(200)
    average = macro_average({"small": small, "large": large})
    # Wilson's limits with t: 1 / (1 + 12.706^2 / 2) of two right ones, x / (1 + x) with x = 1.972^2 / 200 of none.
    assert average.mean == 0.5
    assert (average.low, average.high) == pytest.approx((0.5 - (1 - 0.012236) / 2, 0.5 + 0.019072 / 2), abs=1e-5)
    rng = np.random.default_rng(1)
    a, b = (rng.random(100) < 0.5).astype(float), (rng.random(400) < 0.5).astype(float)
    average = macro_average({"a": a, "b": b})
    error = np.sqrt(a.var() / 100 + b.var() / 400) / 2  # of the mean of two independent means
    assert average.mean == pytest.approx((a.mean() + b.mean()) / 2)
    assert average.high - average.low == pytest.approx(2 * 1.96 * error, rel=0.08)


def test_scores_by_grader():
    np.testing.assert_allclose(question_scores(RESULTS), [0.5, 0.25])
    np.testing.assert_allclose(question_scores(RESULTS, "strict"), [0.25, 0.5])


@pytest.mark.parametrize(
    ("a", "b"),
    [("\\dfrac{1}{2}", "\\frac{1}{2}"), ("$ 7 $", "7."), ("\\left( 1, 2 \\right)", "(1,2)"), ("1\\,000", "1000")],
)
def test_layout_is_no_other_vote(a, b):
    assert vote_form(a) == vote_form(b)


def test_what_is_not_a_vote():
    assert vote_form(None) is None
    assert vote_form(" . ") is None
    assert vote_form("7") != vote_form("8")
