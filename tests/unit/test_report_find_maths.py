"""Which parts of a text are formulas."""

import time

import pytest

from megatron_nft.report.find_maths import Formula, find_maths


def inline(source):
    return Formula(source, display=False)


def display(source):
    return Formula(source, display=True)


def boxed(source):
    return Formula(source, display=False, boxed=True)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("no maths", ["no maths"]),
        ("$x$", [inline("x")]),
        ("a $x^2$ b", ["a ", inline("x^2"), " b"]),
        (r"\(x\) and \[y\]", [inline("x"), " and ", display("y")]),
        ("$$x$$$y$", [display("x"), inline("y")]),
        (r"So \boxed{\frac{1}{2}}.", ["So ", boxed(r"\frac{1}{2}"), "."]),
        (r"\boxed{a\}b}", [boxed(r"a\}b")]),
        (r"\begin{align*}x\end{align*}!", [display(r"\begin{align*}x\end{align*}"), "!"]),
        (r"\begin{itemize}x\end{itemize}", [r"\begin{itemize}x\end{itemize}"]),
        (r"$\text{\$}$", [inline(r"\text{\$}")]),
    ],
)
def test_formulas_and_what_is_between_them(text, parts):
    assert find_maths(text) == parts


@pytest.mark.parametrize(
    "text",
    [
        "It costs $5 and $7.",  # no digit after the last dollar
        "It costs $5, not 7 $ more",  # no space before it
        "a $ b$",  # no space after the first dollar
        r"\$5 is not $6",
        "$a\n\nb$",  # no blank line inside
        "$" + "a" * 2000 + "$",
        "$",
        "$$x",
        r"\[x",
        r"\(x",
        r"\boxed{x",
        r"\begin{cases}x",
        "\\",
    ],
)
def test_what_is_no_formula_stays_text(text):
    assert find_maths(text) == [text]


def test_an_unclosed_box_hides_no_later_one():
    assert find_maths(r"\boxed{ \boxed{5}") == [r"\boxed{ ", boxed("5")]


def test_no_character_is_lost():
    text = "a $x$ b\\[y\\]\\boxed{z} $5 $$u$$ \\(v\\) \\begin{gathered}w\\end{gathered}\n$"
    written = {"x": "$x$", "y": r"\[y\]", "z": r"\boxed{z}", "u": "$$u$$", "v": r"\(v\)"}
    parts = (part if isinstance(part, str) else written.get(part.source, part.source) for part in find_maths(text))
    assert "".join(parts) == text


@pytest.mark.parametrize("piece", [r"\boxed{", r"\[", r"\(", "$$", "$a ", r"\begin{cases}", "$ ", "\\boxed{$\\["])
def test_time_is_linear_in_a_text_that_goes_round_in_circles(piece):
    """A quadratic search would take minutes."""
    text = piece * (500_000 // len(piece))
    started = time.process_time()
    find_maths(text)
    assert time.process_time() - started < 5
