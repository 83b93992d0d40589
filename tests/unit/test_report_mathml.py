"""LaTeX to trees of MathML: what is converted, and that nothing but MathML comes out."""

import json
import os
import re
from pathlib import Path
from xml.parsers.expat import ExpatError

import pytest

from megatron_nft.report.find_maths import Formula, find_maths
from megatron_nft.report.mathml import (
    ATTRIBUTES,
    ELEMENTS,
    LONGEST_FORMULA,
    MAX_DEPTH,
    MAX_SIZE,
    checked_tree,
    to_mathml,
)  # fmt: skip

DATA = Path(os.environ.get("NFT_DATA_DIR", Path(__file__).resolve().parents[3] / "shared" / "data"))


def nodes(tree):
    """(name, attributes) of every element of a tree."""
    children = tree[1:]
    attributes = children.pop(0) if children and isinstance(children[0], dict) else {}
    found = [(tree[0], attributes)]
    for child in children:
        if isinstance(child, list):
            found += nodes(child)
    return found


def text(tree):
    return "".join(part if isinstance(part, str) else text(part) for part in tree[1:] if not isinstance(part, dict))


def names(latex, display=True):
    return [name for name, _ in nodes(to_mathml(latex, display))]


def test_a_formula_inline_and_on_its_own_line():
    fraction = ["mfrac", ["mn", "1"], ["mi", "x"]]
    assert to_mathml(r"\frac{1}{x}", display=False) == ["math", fraction]
    assert to_mathml(r"\frac{1}{x}", display=True) == ["math", {"display": "block"}, fraction]


def test_functions_and_comparisons_are_characters_and_no_entities():
    assert text(to_mathml(r"\sin x < 2 \& 3", display=False)) == "sin\u2061x<2&3"


@pytest.mark.parametrize(
    ("latex", "element"),
    [
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "mtable"),
        (r"\begin{cases}1&\text{if }x\\2\end{cases}", "mtable"),
        (r"\begin{aligned}a&=b\\&=c\end{aligned}", "mtable"),
        (r"\begin{split}a&=b\\&=c\end{split}", "mtable"),
        (r"\sum_{\substack{i<j\\k}} x", "munder"),
        (r"E = mc^2 \tag{1}", "mtable"),
        (r"1 \dotsb 2 \dotsm 3, \dotsc, 4", "mo"),
        (r"\widetilde{AB}\textnormal{Re} 5\AA", "mover"),
        (r"\boxed{42}", "menclose"),
        (r"\cancel{x}", "menclose"),
    ],
)
def test_what_models_write_is_known(latex, element):
    assert element in names(latex)


def test_maths_inside_of_text_inside_of_maths():
    tree = to_mathml(r"\mbox{if $n$ is $2k$, or so}", display=True)
    assert text(tree) == "if\xa0n\xa0is\xa02k,\xa0or\xa0so"
    assert [name for name, _ in nodes(tree)].count("mi") == 2  # n and k


def test_a_line_break_outside_of_an_environment_breaks_the_line():
    assert names(r"a=b\\c=d").count("mtr") == 2
    assert names(r"\begin{aligned}a\\b\end{aligned}").count("mtr") == 2


def test_a_line_below_a_table_is_a_border_and_no_row():
    table = to_mathml(r"\begin{array}{|c|}\hline a\\\hline b\\\hline\end{array}", display=True)
    assert [name for name, _ in nodes(table)].count("mtr") == 2
    [style] = [attributes["style"] for name, attributes in nodes(table) if name == "mtable"]
    assert "border-bottom" in style


@pytest.mark.parametrize(
    "latex",
    [
        r"\undefined{x}",
        r"\frac{1",
        "}",
        r"\left( x",
        r"\begin{matrix}1",
        r"a & b",
        r"\href{javascript:alert(1)}{x}",
        r"\url{javascript:alert(1)}",
        r"\includegraphics{http://example.org/x.png}",
        r"\htmlStyle{position:fixed}{x}",
        r"\htmlId{x}{y}",
        r"\class{x}{y}",
        r"\color{red;position:fixed}x",
        r'\textcolor{red" onclick="x}{y}',
        r'\begin{array}{c" onclick="x}1\end{array}',
        r"\begin{align}x\label{end}\end{align}",  # an id, which the page's own elements have
        r"\def\x{\x\x}\x",
        r"\newcommand{\x}{\x\x}\x",
        r"\hspace{99999em}x",
        r"\kern-9999pt x",
        r"\genfrac{}{}{999em}{}{a}{b}",
        r"\raisebox{500em}{x}",
        "a\x00b",
        "a\x01b",
        "a\ud83db",
        "x" * (LONGEST_FORMULA + 1),
        "a^{" * (MAX_DEPTH + 1) + "b" + "}" * (MAX_DEPTH + 1),
    ],
)
def test_what_is_unknown_or_harmful_is_not_converted(latex):
    assert to_mathml(latex, display=True) is None
    assert to_mathml(latex, display=False) is None


@pytest.mark.parametrize(
    "latex",
    [
        "<script>alert(1)</script>",
        '<img src=x onerror="alert(1)">',
        r"\text{</mtext></math><script>alert(1)</script>}",
        r"\text{<!-- } x \text{ --><b onclick=alert(1)>}",
        r"\operatorname{<a href=x>}",
        r"\mathrm{<style>}",
        r"\text{<![CDATA[<script>]]>}",
        r"\text{\textbf{<svg/onload=alert(1)>}}",
        r"\tag{<script>} x",
        r"\newcommand{\x}[1]{\text{<#1>}}\x{script}",
    ],
)
def test_html_in_a_formula_is_text(latex):
    tree = to_mathml(latex, display=True)
    assert {name for name, _ in nodes(tree)} <= ELEMENTS
    assert all(set(attributes) <= ATTRIBUTES for _, attributes in nodes(tree))
    assert "<" in text(tree)


@pytest.mark.parametrize(
    "inside",
    [
        "<script>x</script>",
        "<a>x</a>",
        "<mi href='x'>x</mi>",
        "<mi onclick='x'>x</mi>",
        "<mi id='end'>x</mi>",
        "<mi style='position:fixed'>x</mi>",
        "<mi style='color:red;position:fixed'>x</mi>",
        "<mi style='color:url(x)'>x</mi>",
        "<mi class='answer'>x</mi>",
        "<mspace width='21em'/>",
        "<mspace width='1e9em'/>",
        "<mspace width='90vw'/>",
        "<mtable style='width: 101%'/>",
        "<!-- x -->",
        "<?x y?>",
    ],
)
def test_whatever_the_converter_writes_only_mathml_passes(inside):
    with pytest.raises(ValueError):
        checked_tree(f"<math>{inside}</math>")


def test_what_a_formula_needs_passes():
    mathml = (
        "<math display='block'><mi style='color:#FF0000;padding: 0.5em'>x</mi><mspace width='2em'/>"
        "<mtable style='width: 100%'/><mrow class='menclose-updiagonalstrike'/></math>"
    )
    assert len(nodes(checked_tree(mathml))) == 5


@pytest.mark.parametrize("mathml", ["<math><mi>x</math>", "<math>", "", "<math>&nbsp;</math>", "<math/><math/>"])
def test_what_is_not_well_formed_is_refused(mathml):
    with pytest.raises(ExpatError):
        checked_tree(mathml)


def test_only_a_math_element_is_one():
    with pytest.raises(ValueError):
        checked_tree("<mrow/>")


def test_a_doctype_is_refused():
    with pytest.raises(ValueError):
        checked_tree("<!DOCTYPE math [<!ENTITY x 'xx'>]><math>&x;</math>")


def test_formulas_of_a_data_set_are_converted():
    """At least 199 in 200 of the distinct formulas of the MATH training split, with the spaces that they ask for."""
    path = DATA / "train" / "math.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set NFT_DATA_DIR")
    problems = [json.loads(line)["problem"] for line in path.read_text(encoding="utf-8").splitlines()]
    formulas = {part[:2] for problem in problems for part in find_maths(problem) if isinstance(part, Formula)}
    trees = [to_mathml(source, display) for source, display in formulas]
    assert len(formulas) > 10_000
    assert sum(tree is None for tree in trees) < len(formulas) / 200
    sizes = [float(n) for tree in trees if tree for n in re.findall(r"([\d.]+)r?em", json.dumps(tree))]
    assert 0 < max(sizes) <= MAX_SIZE
