"""The parts of the default grader: spelling, reading, comparing, finding. The corpus has the verdicts as a whole."""

import dataclasses
import itertools
import json
import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from megatron_nft.types import Verdict
from megatron_nft.verify import Outcome, grade_one, graders, maths
from megatron_nft.verify.algebra.answer import read
from megatron_nft.verify.algebra.comparison import same_value
from megatron_nft.verify.algebra.equality import same
from megatron_nft.verify.algebra.exact import exact
from megatron_nft.verify.algebra.normalize import normalize, without_spaces
from megatron_nft.verify.algebra.tree import NotUnderstood, TooMuch, read_number
from megatron_nft.verify.algebra.units import canonical
from megatron_nft.verify.algebra.values import OutOfRange, Undecided
from megatron_nft.verify.boxed import last_box, last_boxes
from megatron_nft.verify.extract import find_answer
from megatron_nft.verify.outcome import combine, shorten

CORPUS = Path(__file__).parents[1] / "golden" / "grading_corpus.jsonl"
ANSWERS = sorted({json.loads(line)["answer"] for line in CORPUS.read_text(encoding="utf-8").splitlines()})
PIECES = [
    *"0123456789abcxyzeiABC+-*/^_=<>()[]{}|!,;:.%$'& \\\"~",
    *("\\frac", "\\sqrt", "\\pi", "\\text{", "\\left(", "\\right)", "\\cup", "\\infty", "\\pm", "\\circ", "\\le"),
    *("\\in", "\\{", "\\}", "\\\\", "and", "cm", "\\begin{pmatrix}", "\\end{pmatrix}", "\N{ZERO WIDTH SPACE}"),
    *("\N{SQUARE ROOT}", "\N{VULGAR FRACTION ONE HALF}", "\N{SUPERSCRIPT TWO}", "\N{EURO SIGN}"),
    *(
        "\\begin{cases}",
        "\\end{cases}",
        "\\pmod 7",
        "\\text{ hours }",
        "\\overline{3}",
        "\\text{ for all }",
        "\\mathbb{Z}",
    ),
    *("\\choose", "\\over", "\\mathbf{i}", "\\boxed{", "mod", "mg", "m/s", "\\text{4 ways}", "_{\\text{two}}", "\\mid"),
]


def mutations(count: int, seed: int):
    """(answer, changed answer): pieces put in, taken out and exchanged at random."""
    generator = random.Random(seed)
    for _ in range(count):
        answer = generator.choice(ANSWERS)
        pieces = list(answer)
        for _ in range(generator.choice((1, 1, 2, 3, 6))):
            at = generator.randrange(len(pieces) + 1)
            action = generator.random()
            if action < 0.4 or at == len(pieces):
                pieces.insert(at, generator.choice(PIECES))
            elif action < 0.7:
                del pieces[at]
            else:
                pieces[at] = generator.choice(PIECES)
        yield answer, "".join(pieces)


def test_equal_spellings_have_equal_values():
    """The quick way (equal spelling) accepts nothing that reading and comparing would not."""
    checked = 0
    for answer, changed in mutations(20_000, seed=1):
        gold, found = normalize(answer), normalize(changed)
        if gold == found or not gold or without_spaces(gold) != without_spaces(found):
            continue
        if "text" in gold:  # a space within a word is a slip of the pen
            continue
        try:
            readings = read(gold, lenient=False), read(found)
            assert any(same(a, b) for a, b in itertools.product(*readings)), (answer, changed)
        except (NotUnderstood, Undecided):
            continue
        checked += 1
    assert checked > 60


def test_no_input_makes_the_grader_fail(monkeypatch):
    """Whatever is written, our own parser ends with a verdict or with a reason; math-verify is left out here."""
    monkeypatch.setattr(maths, "_symbolically", lambda *_: Outcome(Verdict.UNPARSEABLE, reason="not understood"))
    for answer, changed in mutations(5_000, seed=2):
        for response in (f"\\boxed{{{changed}}}", f"Answer: {changed}", changed, f"so $x$ is ${changed}$."):
            outcome = graders.call(maths.grade, response, answer, "", None)
            assert "failed" not in outcome.reason, (answer, response, outcome)


def test_every_answer_is_the_same_as_itself():
    for answer in ANSWERS:
        try:
            readings = read(normalize(answer), lenient=False)
        except NotUnderstood:
            continue
        for tree in readings:
            assert same(tree, tree)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\dfrac12", r"\frac{1}{2}"),
        ("$\\frac{1}{2}$", r"\frac{1}{2}"),
        (r"\left(3,\,4\right]", "(3, 4 ]"),
        (r"11,\! 111,\! 111,\! 100", "11,111,111,100"),
        ("10 080", "10080"),
        ("1 2", "1 2"),
        (r"1 \text{ or } 2", "1 , 2"),
        (r"\text{not }0", r"\text{not}0"),
        (r"\text{ellipse.}", r"\text{ellipse}"),
        ("5!", "5!"),
        ("2**3", "2^3"),
        ("**C**", "C"),
        (r"\begin{matrix} 1 \\ 2 \end{matrix}", r"\begin{matrix} 1 \\ 2 \end{matrix}"),
        ("8.49×10⁻⁴", r"8.49\times10^{-4}"),  # noqa: RUF001
    ],
)
def test_normalize(text, expected):
    assert normalize(text) == expected


def test_normalize_is_idempotent():
    for answer in ANSWERS:
        assert normalize(normalize(answer)) == normalize(answer)


@pytest.mark.parametrize(
    ("token", "value"),
    [
        ("12", 12),
        (".5", Fraction(1, 2)),
        ("1.", 1),
        ("1.50", Fraction(3, 2)),
        ("4e-7", Fraction(4, 10**7)),
        ("1E3", 1000),
        pytest.param("7" * 5000, (10**5000 - 1) // 9 * 7, id="5000 sevens"),  # Python reads no more than 4300 digits
        pytest.param("1" + "0" * 9998 + "3", 10**9999 + 3, id="10000 digits"),
        pytest.param("0." + "0" * 4999 + "1", Fraction(1, 10**5000), id="5000 places"),
        pytest.param("1e5000", 10**5000, id="exponent of 5000"),
    ],
)
def test_numbers_are_exact(token, value):
    assert read_number(token) == value


@pytest.mark.parametrize("token", ["7" * 10_001, "1e10001", "1e-99999999999"])
def test_numbers_of_too_many_digits(token):
    with pytest.raises(TooMuch):
        read_number(token)


def value_of(text: str):
    return exact(read(normalize(text))[0])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"1\frac{4}{5}", Fraction(9, 5)),
        ("1 4/5", Fraction(9, 5)),
        (r"-1\frac{4}{5}", Fraction(-9, 5)),
        (r"2\frac{5}{4}", Fraction(5, 2)),  # not proper, so a product
        ("2(3/4)", Fraction(3, 2)),
        ("-2^2", -4),
        ("(-2)^2", 4),
        ("2^3^2", 512),
        ("2^{-3}", Fraction(1, 8)),
        ("10^-2", Fraction(1, 100)),
        ("6/2*3", 9),
        ("5!/3!", 20),
        (r"\binom{5}{2}", 10),
        ("50%", Fraction(1, 2)),
        ("3:4", Fraction(3, 4)),
    ],
)
def test_precedence(text, value):
    assert value_of(text) == value


def test_values_out_of_range_are_not_compared():
    with pytest.raises(OutOfRange):
        same_value(read("9^{9^{9^{9}}}")[0], read("\\sqrt{2}")[0])
    with pytest.raises(Undecided):
        same_value(read("\\infty-\\infty")[0], read("\\sqrt{2}")[0])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("square centimeters", "cm^2"),
        ("cm squared", "cm^{2}"),
        ("miles per hour", "mph"),
        ("km/h", "kilometers per hour"),
        ("m/s^2", "meters per second squared"),
        ("inches", "in"),
        ("degrees", "deg"),
        ("Dollars", "dollar"),
        ("eggs", "egg"),
    ],
)
def test_units_that_are_the_same(first, second):
    assert canonical(first) == canonical(second)


def test_units_that_differ():
    names = [
        "m",
        "cm",
        "cm^2",
        "km",
        "mm",
        "kg",
        "g",
        "s",
        "min",
        "h",
        "m/s",
        "km/h",
        "cents",
        "dollars",
        "deg",
        "J",
        "kJ",
    ]
    assert len({canonical(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"a \boxed{1} b \boxed{\frac{1}{2}} c", r"\frac{1}{2}"),
        (r"\boxed{1}, \boxed{2} and \boxed{3}", "1, 2, 3"),
        (r"\boxed{ 7 } again \boxed {8}", "8"),
        (r"\boxed{a\}b}", r"a\}b"),
        (r"\boxed 5", "5"),
        (r"\boxed{5", None),
        ("work\n#### 1,200", "1,200"),
        ("Answer: 4.5e33", "4.5e33"),
        ("**Answer:** $x=5$.", "x=5"),
        ("The final answer is:\n\\[ (3,4] \\]", "(3,4]"),
        ("Hence the answer is 5, since 3 + 2 = 5", "5"),
        ("We get $1$ or $3$.", "1 , 3"),
        ("He pays $18 and she pays $36.", "$36"),
        ("", None),
    ],
)
def test_find_answer(response, answer):
    found = find_answer(response)
    assert found == answer or (found and found.strip() == answer)


def test_last_box_and_boxes():
    assert last_box(r"\boxed{1} and \boxed{2}") == "2"
    assert last_boxes(r"\boxed{1} and \boxed{2}") == "1, 2"
    assert last_boxes(r"\boxed{1}, which we need later, and so on. \boxed{2}") == "2"
    assert last_boxes("none") is None


@pytest.mark.parametrize(
    ("grader", "response", "answer", "verdict"),
    [
        ("dapo_boxed", r"\boxed{\dfrac12}", r"$\frac{1}{2}$", "correct"),
        ("dapo_boxed", r"\boxed{0.5}", r"\frac{1}{2}", "wrong"),
        ("dapo_boxed", "Answer: 5", "5", "unparseable"),
        ("dapo_boxed", r"\boxed{4} \boxed{5}", "5", "correct"),
        ("dapo_minerva", "Answer: 4\nAnswer: 5", "5", "correct"),
        ("dapo_minerva", "answer: $5$.", "5", "correct"),
        ("dapo_minerva", r"\boxed{5}", "5", "unparseable"),
        ("dapo_minerva", r"Answer: \boxed{5}", "5", "correct"),
        ("numeric", r"\boxed{3.1412}", r"\pi", "correct"),
        ("numeric", r"\boxed{3.13}", r"\pi", "wrong"),
        ("numeric:0.01", r"\boxed{3.13}", r"\pi", "correct"),
        ("numeric", r"\boxed{-5}", "5", "wrong"),
        ("numeric", r"\boxed{x+1}", "5", "unparseable"),
        ("numeric", r"\boxed{5}", "x", "unparseable"),
        ("numeric", r"\boxed{5.001 \text{ cm}}", "5", "correct"),
        ("numeric:0", r"\boxed{1/3}", r"\frac{2}{6}", "correct"),
        ("maths", r"\boxed{0.5}", r"\frac{1}{2}", "correct"),
        ("maths", r"\boxed{5 \text{ m}}", "5 \\text{ cm}", "wrong"),
        ("math_verify_plain", r"\boxed{0.5}", r"\frac{1}{2}", "correct"),
        ("math_verify_plain", r"\boxed{0.4}", r"\frac{1}{2}", "wrong"),
        ("math_verify_plain", r"\boxed{2}", r"so $x$ is $\boxed{2}$", "correct"),
        ("math_verify_plain", r"\boxed{5 \text{ m}}", "5 \\text{ cm}", "correct"),  # it drops units; ours refuses this
        ("math_verify_plain", "no idea", "5", "unparseable"),
        ("math_verify_plain", r"\boxed{5}", "", "unparseable"),
    ],
)
def test_graders_by_name(grader, response, answer, verdict):
    graded = grade_one(response, answer, grader)
    assert graded.verdict == verdict, graded
    assert graded.grader == grader
    if verdict == "unparseable":
        assert graded.reason


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("He fills 3 boxes, so 3 * 4 = 12.\n#### 12", "12"),
        (r"The \$12 box. #### 12", "12"),
        (r"first \boxed{4}, then \framebox{12}", "12"),
        (r"x is \fbox{12}", "12"),
        (r"\boxed{12} and \boxed{13}", "12, 13"),
    ],
)
def test_a_solution_as_the_reference(solution, answer):
    assert maths.gold_text(solution) == answer
    assert grade_one(f"\\boxed{{{answer}}}", solution).verdict == "correct"
    assert grade_one(r"\boxed{4}", solution).verdict == "wrong"


def test_the_former_name_of_the_default_grader_warns_and_grades_the_same():
    with pytest.warns(FutureWarning, match="the grader math_verify is now called maths"):
        graded = grade_one(r"\boxed{5 \text{ m}}", "5 \\text{ cm}", "math_verify,dapo_boxed")
    assert graded == dataclasses.replace(
        grade_one(r"\boxed{5 \text{ m}}", "5 \\text{ cm}", "maths,dapo_boxed"), seconds=graded.seconds
    )
    assert (graded.grader, graded.verdict) == ("maths", "wrong")


def test_the_warning_of_a_former_name_is_printed_once():
    program = "from megatron_nft.verify import split_names\nfor _ in range(3): split_names('math_verify')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr.count("FutureWarning: the grader math_verify is now called maths") == 1


@pytest.mark.parametrize(
    ("first", "second", "policy", "ignored"),
    [
        ("wrong", "correct", "trust_first", False),
        ("wrong", "correct", "drop", True),
        ("wrong", "correct", "not_negative", True),
        ("correct", "wrong", "drop", True),
        ("correct", "wrong", "not_negative", False),
        ("timeout", "correct", "not_negative", True),
        ("wrong", "unparseable", "drop", False),
        ("correct", "correct", "drop", False),
    ],
)
def test_combine(first, second, policy, ignored):
    graded = combine(("a", "b"), [Outcome(Verdict(first)), Outcome(Verdict(second))], 0.5, policy)
    assert (graded.verdict, graded.grader, graded.ignored) == (first, "a", ignored)
    assert graded.by_grader == {"a": first, "b": second}


def test_extracted_answers_can_be_written_to_a_file():
    assert shorten("\ud800x").encode()
    assert len(shorten("x" * 10**6)) < 3000
    assert shorten(None) is None
