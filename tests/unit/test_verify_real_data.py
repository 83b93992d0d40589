"""What the default grader accepts and refuses on the reference answers of the public benchmarks."""

import json
import re
from collections import Counter
from fractions import Fraction

import pytest
from verify_rewrites import (
    BENCHMARKS,
    DATA,
    box,
    content,
    equivalents,
    near_misses,
    other_rows,
    references,
    wrappings,
)

from megatron_nft.verify import maths
from megatron_nft.verify.algebra.answer import read
from megatron_nft.verify.algebra.normalize import normalize
from megatron_nft.verify.algebra.tree import NotUnderstood
from megatron_nft.verify.algebra.values import mp, symbols, value
from megatron_nft.verify.maths import grade

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no public data in {DATA} (set NFT_DATA_DIR)")
EVERY = {"gsm8k": 4}  # every fourth row of the large and simple one


def rows_of(benchmark: str) -> list[str]:
    return references(benchmark)[:: EVERY.get(benchmark, 1)]


def is_correct(response: str, answer: str) -> bool:
    return grade(response, answer, "", None).verdict == "correct"


def accepted(benchmark: str, variants) -> tuple[int, int, Counter]:
    """Accepted, all, and the names of the variants that were refused (or, for near misses, accepted)."""
    total, names = 0, Counter()
    for answer in rows_of(benchmark):
        for name, response in variants(answer):
            if response:
                total += 1
                names[name, is_correct(response, answer)] += 1
    return sum(count for (_, ok), count in names.items() if ok), total, names


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_each_reference_against_itself(benchmark):
    correct, total, names = accepted(benchmark, wrappings)
    assert total > 20 * len(rows_of(benchmark)) * 0.8
    needed = 0.99 if benchmark == "minerva_math" else 0.995
    assert correct / total >= needed, {name: count for (name, ok), count in names.items() if not ok}


def test_equivalent_rewrites():
    counts = [accepted(benchmark, equivalents) for benchmark in BENCHMARKS]
    correct, total = (sum(count[index] for count in counts) for index in (0, 1))
    assert total > 4000
    assert correct / total >= 0.98, Counter(
        {name: n for count in counts for (name, ok), n in count[2].items() if not ok}
    )
    covered = {name for count in counts for name, _ in count[2]}
    for name in (
        "times_ten",
        "thousands_thin",
        "unicode_root",
        "unicode_pi",
        "doubled_fraction",
        "text_stop",
        "reordered",
    ):
        assert name in covered


def test_near_misses():
    counts = [accepted(benchmark, near_misses) for benchmark in BENCHMARKS]
    correct, total = (sum(count[index] for count in counts) for index in (0, 1))
    assert total > 5000
    assert correct / total <= 0.005, Counter({name: n for count in counts for (name, ok), n in count[2].items() if ok})
    covered = {name for count in counts for name, _ in count[2]}
    wanted = "base_nine product_not_mixed e_times other_unit not only_part_0 swapped"
    assert covered >= set(wanted.split())


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_other_rows_answers(benchmark):
    """At most 2 in 10,000 pairs whose texts differ, equal values among them (x=5 and 5) counted as wrong."""
    pairs = list(other_rows(references(benchmark), 10_000))
    wrongly = [(gold, other) for gold, other in pairs if is_correct(box(content(other)), gold)]
    assert len(wrongly) <= 2, wrongly


def test_solutions_as_references():
    """GSM8K's own solutions, which hold the answer at their end, serve as references."""
    for line in (DATA / "eval" / "gsm8k.jsonl").read_text(encoding="utf-8").splitlines()[:100]:
        solution = json.loads(line)["answer"]
        assert is_correct(solution, solution)
        assert not is_correct("\\boxed{123456789}", solution)


def test_training_answers_are_read():
    """Of the MATH training split, at least 99.5 % of the references are accepted in a box with \\dfrac."""
    lines = (DATA / "train" / "math.jsonl").read_text(encoding="utf-8").splitlines()[::5]
    answers = [answer for line in lines if (answer := json.loads(line)["answer"])]
    refused = [a for a in answers if not is_correct(box(a.replace("\\frac", "\\dfrac") + "."), a)]
    assert len(refused) / len(answers) <= 0.005, refused


_READ_DIFFERENTLY = re.compile(
    r"""
      \de[+-]?\d          # 4.5e33: math-verify takes the e for Euler's number
    | _\{?\d             # numerals of another base
    | \\circ             # degrees within a sine
    | \\gamma            # taken for Euler's constant
    | \\log              # without a base: natural here, to the base of ten there
    | [\d}]\s*[a-zA-Z]$ # a letter at the end, which math-verify drops as a unit
    | \\frac\s*\{1\}\{m\}
    """,
    re.VERBOSE,
)


def test_values_agree_with_sympy():
    """Every expression that math-verify's parser reads as well has the value that sympy gives it."""
    import sympy

    compared, different = 0, []
    for text in {
        normalize(content(a)) for name in ("math500", "olympiadbench", "minerva_math") for a in references(name)
    }:
        try:
            tree = read(text, lenient=False)[0]
        except NotUnderstood:
            continue
        parsed = maths._parse(text) if tree[0] in "+-*/^!" or tree[0] in ("f", "root", "log", "binom") else ()
        if not parsed or not isinstance(parsed[0], sympy.Expr):
            continue
        bare = {re.sub(r"[\\_{}]", "", name): name for name in symbols(tree)}
        point = {name: Fraction(3 + 7 * index, 5 + index) for index, name in enumerate(sorted(bare.values()))}
        known = {"i": sympy.I, "e": sympy.E}
        numbers = {
            symbol: point.get(bare.get(re.sub(r"[\\_{}]", "", symbol.name)), known.get(symbol.name))
            for symbol in parsed[0].free_symbols
        }
        if None in numbers.values():
            continue
        try:
            theirs = complex(sympy.N(parsed[0].subs(numbers).doit(), 20))
        except (TypeError, OverflowError):  # it left something unevaluated, or the value is no float
            continue
        numbers = {name: mp.mpf(number.numerator) / number.denominator for name, number in point.items()}
        ours = complex(value(tree, numbers))
        compared += 1
        if abs(ours - theirs) > 1e-9 * max(1.0, abs(ours)):
            different.append(text)
    assert compared > 250
    assert [text for text in different if not _READ_DIFFERENTLY.search(text)] == []
