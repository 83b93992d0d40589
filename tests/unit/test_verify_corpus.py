"""Hostile and tricky pairs with known verdicts (tests/golden/grading_corpus.jsonl).

Each line: name, reference answer, response, verdict. A long response is described as [before, repeated, times, after].
The verdicts were written by hand; a hostile pair allows several, because all that matters is that it is answered in
time, never `correct` without being so, and without a trace in other rows.
"""

import importlib.util
import json
from pathlib import Path

import pytest

from megatron_nft.config import VerifyConfig
from megatron_nft.verify import VerifierPool, grade_one

CORPUS = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "golden" / "grading_corpus.jsonl").read_text(encoding="utf-8").splitlines()
]
TRICKY = [pair for pair in CORPUS if "hostile" not in pair]
HOSTILE = [pair for pair in CORPUS if "hostile" in pair]
TIMEOUT_S = 3.0
MEMORY_BYTES = 1 << 30


def response_of(pair: dict) -> str:
    response = pair["response"]
    if isinstance(response, str):
        return response
    before, repeated, times, after = response
    return before + repeated * times + after


def test_the_corpus_is_large_enough():
    assert len(CORPUS) >= 200
    assert len(HOSTILE) >= 80
    assert len({pair["name"] for pair in CORPUS}) == len(CORPUS)


@pytest.mark.parametrize("pair", TRICKY, ids=lambda pair: pair["name"])
def test_tricky(pair):
    graded = grade_one(response_of(pair), pair["answer"])
    assert graded.verdict == pair["verdict"], graded


@pytest.fixture(params=["python", "gmpy"])
def arithmetic(request, monkeypatch):
    """sympy and mpmath of the worker processes on Python's integers, as without gmpy2, and on those of GMP."""
    if request.param == "gmpy":
        if importlib.util.find_spec("gmpy2") is None:
            pytest.skip("gmpy2 is not installed (it is optional): pip install gmpy2, and this runs")
        monkeypatch.setenv("SYMPY_GROUND_TYPES", "gmpy")
        monkeypatch.delenv("MPMATH_NOGMPY", raising=False)
    else:
        monkeypatch.setenv("SYMPY_GROUND_TYPES", "python")
        monkeypatch.setenv("MPMATH_NOGMPY", "1")
    return request.param


@pytest.mark.parametrize("arithmetic", [pytest.param("python", marks=pytest.mark.long), "gmpy"], indirect=True)
def test_hostile(arithmetic):
    """All hostile pairs, an innocent one after each."""
    innocent = TRICKY[:: len(TRICKY) // len(HOSTILE)]
    config = VerifyConfig(workers=2, timeout_s=TIMEOUT_S, memory_bytes=MEMORY_BYTES)
    with VerifierPool(config) as pool:
        futures = []
        for index, pair in enumerate(HOSTILE):
            beside = innocent[index % len(innocent)]
            for each in (pair, beside):
                futures.append((each, pool.submit(response_of(each), each["answer"])))
        for pair, future in futures:
            graded = future.result(600)
            allowed = pair["verdict"] if "hostile" in pair else [pair["verdict"]]
            assert graded.verdict in allowed, (pair["name"], graded)
            # On the clock. The bound is on what a row uses itself, and others may use the processors at the same time.
            assert graded.seconds <= 10 * TIMEOUT_S, (pair["name"], graded)
            if graded.verdict in ("unparseable", "timeout"):
                assert graded.reason, pair["name"]


def test_arithmetic_that_ignores_signals_costs_one_verdict(arithmetic):
    """GMP's functions do not look at signals: only ending the process helps."""
    config = VerifyConfig(grader="verify_graders.act", workers=1, timeout_s=1.0, memory_bytes=MEMORY_BYTES)
    hostile = ["binomial"] if arithmetic == "gmpy" else []
    with VerifierPool(config) as pool:
        rows = [f"backend {arithmetic}", *hostile, "yes", "no"]
        verdicts = [future.result(60).verdict for future in [pool.submit(row, "yes") for row in rows]]
    assert verdicts == ["correct", *["timeout" for _ in hostile], "correct", "wrong"]


@pytest.mark.parametrize("grader", ["dapo_boxed", "dapo_minerva", "numeric"])
def test_hostile_with_the_other_graders(grader):
    """Never `correct` where the default grader is not allowed to say so."""
    with VerifierPool(VerifyConfig(grader=grader, workers=2, timeout_s=TIMEOUT_S)) as pool:
        futures = [(pair, pool.submit(response_of(pair), pair["answer"])) for pair in HOSTILE]
        for pair, future in futures:
            graded = future.result(600)
            assert graded.verdict != "correct" or "correct" in pair["verdict"], (pair["name"], graded)
