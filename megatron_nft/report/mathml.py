"""LaTeX to MathML, as trees of elements that are known to be harmless.

The LaTeX comes from a model and may be anything. math-core knows no command that makes a link, loads a file or sets
attributes, and escapes what it writes. This module does not rely on that: it reads the result as XML and refuses every
element, attribute and size that a formula has no need of. The page builds its elements from the trees one by one, so
that no HTML parser ever sees what a model wrote.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TypeAlias, Union
from xml.parsers import expat

from math_core import LatexError, LatexToMathML

Tree: TypeAlias = list[Union[str, dict[str, str], "Tree"]]
"""[name, attributes (left out where there are none), child, ...]; a child is a text or a tree."""

LONGEST_FORMULA = 5000  # characters
MAX_EXPANSIONS = 200  # of \newcommand in one formula
MAX_DEPTH = 100  # of elements in each other
MAX_SIZE = 20.0  # em; a space or a line larger than this is meant to spoil the page

ELEMENTS = frozenset(
    {
        "math", "mrow", "mi", "mn", "mo", "mtext", "mspace", "mfrac", "msqrt", "mroot", "msup", "msub", "msubsup",
        "mover", "munder", "munderover", "mmultiscripts", "mprescripts", "none", "mtable", "mtr", "mtd", "menclose",
        "mpadded", "mphantom", "mstyle", "b", "code", "em", "i", "span", "u",
    }
)  # fmt: skip
"""Core MathML, menclose for frames and strikes, and the HTML elements that math-core uses inside of mtext."""
ATTRIBUTES = frozenset(
    {
        "accent", "accentunder", "class", "depth", "display", "displaystyle", "fence", "form", "height", "largeop",
        "linethickness", "lspace", "mathvariant", "maxsize", "minsize", "movablelimits", "notation", "rspace",
        "scriptlevel", "separator", "stretchy", "style", "symmetric", "voffset", "width",
    }
)  # fmt: skip
STYLES = frozenset(
    {
        "border-bottom", "border-left", "border-right", "border-top", "color", "font-style", "font-weight",
        "justify-items", "margin-left", "margin-right", "padding", "padding-bottom", "padding-left", "padding-right",
        "padding-top", "text-align", "width",
    }
)  # fmt: skip
_VALUE = re.compile(r"[\w #.%:;+-]{0,300}", re.ASCII)
_CLASS = re.compile(r"(math-core|menclose)-[a-z-]+")
_COLOR = re.compile(r"#[0-9a-fA-F]{3,8}\b")
_NUMBER = re.compile(r"(\d*\.?\d+)([a-zA-Z%]*)", re.ASCII)
_UNITS = frozenset({"", "em", "rem", "ex", "px", "pt"})  # none is larger than em, as far as a formula goes
_NESTING = re.compile(r"\\(?:begin|end)(?![a-zA-Z])|\\.|[{}]", re.DOTALL)
_MATHS_IN_TEXT = re.compile(r"(\\(?:text|mbox|textrm)\{[^{}$]*)\$([^$]*)\$")

_MACROS = {
    "AA": r"\text{Å}",
    "allowbreak": "{}",
    "centerdot": r"\cdot",
    "dotsb": r"\cdots",
    "dotsc": r"\ldots",
    "dotsi": r"\cdots",
    "dotsm": r"\cdots",
    "dotso": r"\ldots",
    "enskip": r"\hspace{0.5em}",
    "hbox": r"\text{#1}",
    "mbox": r"\text{#1}",
    "nobreak": "{}",
    "sdot": r"\cdot",
    "smallsetminus": r"\setminus",
    "substack": r"\begin{subarray}{c}#1\end{subarray}",
    "textnormal": r"\text{#1}",
    "textup": r"\text{#1}",
    "varpropto": r"\propto",
}
"""Commands of LaTeX and amsmath that math-core does not have. Macros that nothing uses cost nothing."""
_CONVERTER = LatexToMathML(
    macros=_MACROS, max_expansions=MAX_EXPANSIONS, fancy_error=False, allow_unreliable_rendering=True
)


def to_mathml(latex: str, display: bool) -> Tree | None:
    """The `math` element of a formula; None for what is no LaTeX that math-core knows, or more than a page should take.

    Args:
        latex: the formula without its delimiters.
        display: whether it stands on a line of its own.
    """
    if len(latex) > LONGEST_FORMULA:
        return None
    latex = latex.replace("{split}", "{aligned}")  # what amsmath's split is outside of an equation with a number
    for _ in range(latex.count("$") // 2):  # math-core knows no maths inside of text
        latex = _MATHS_IN_TEXT.sub(r"\1}\2\\text{", latex)
    if _breaks_lines(latex):
        latex = rf"\begin{{gathered}}{latex}\end{{gathered}}"
    try:
        return checked_tree(_convert(latex, display))
    except (LatexError, UnicodeError, expat.ExpatError, _RefusedError):
        return None


def checked_tree(mathml: str) -> Tree:
    """The tree of a `math` element that is written as XML.

    Raises:
        ExpatError: it is not well-formed.
        ValueError: it holds something that is not on this module's lists.
    """
    parser = expat.ParserCreate()
    parser.buffer_text = True
    root: Tree = []
    open_elements = [root]

    def start(name: str, attributes: dict[str, str]) -> None:
        if name not in ELEMENTS or len(open_elements) > MAX_DEPTH:
            raise _RefusedError(f"{name} at depth {len(open_elements)}")
        for key, value in attributes.items():
            if not _attribute_is_fine(key, value):
                raise _RefusedError(f"{key}={value!r}")
        element: Tree = [name, attributes] if attributes else [name]
        open_elements[-1].append(element)
        open_elements.append(element)

    def end(name: str) -> None:
        element = open_elements.pop()
        if name == "mtable":
            _draw_last_line(element)

    def refuse(*_: object) -> None:
        raise _RefusedError("neither an element nor text")

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = lambda text: open_elements[-1].append(text)
    parser.CommentHandler = parser.ProcessingInstructionHandler = parser.StartDoctypeDeclHandler = refuse
    # The two characters that math-core writes by the names that only HTML has.
    parser.Parse(mathml.replace("&ApplyFunction;", "\u2061").replace("&InvisibleTimes;", "\u2062"), True)
    [element] = root
    if not isinstance(element, list) or element[0] != "math":
        raise _RefusedError("no math element")
    return element


class _RefusedError(ValueError):
    """MathML that a formula has no need of."""


def _convert(latex: str, display: bool) -> str:
    try:
        return _CONVERTER.convert_with_local_state(latex, displaystyle=display)
    except LatexError:
        if display and r"\tag" in latex:  # math-core knows tags in numbered environments only
            numbered = rf"\begin{{equation}}{latex}\end{{equation}}"
            return _CONVERTER.convert_with_local_state(numbered, displaystyle=True)
        raise


def _breaks_lines(latex: str) -> bool:
    """Whether there is a line break outside of every group and environment: math-core would drop it."""
    if r"\\" not in latex:
        return False
    depth = 0
    for found in _NESTING.finditer(latex):
        if found[0] == r"\\" and depth == 0:
            return True
        depth += {"{": 1, r"\begin": 1, "}": -1, r"\end": -1}.get(found[0], 0)
    return False


def _draw_last_line(table: Tree) -> None:
    r"""Give a table whose LaTeX ends in \hline its lower border; math-core adds a row of one empty cell instead."""
    match table:
        case ["mtable", dict() as attributes, *_, ["mtr", ["mtd", {"style": str(style)}]]] if "border-top" in style:
            line = style.split(";")[0].replace("border-top", "border-bottom")
            attributes["style"] = f"{attributes.get('style', '')}{line};"
            table.pop()


@lru_cache(maxsize=4096)
def _attribute_is_fine(name: str, value: str) -> bool:
    if name not in ATTRIBUTES or not _VALUE.fullmatch(value):
        return False
    for number, unit in _NUMBER.findall(_COLOR.sub("", value)):
        if float(number) > (100 if unit == "%" else MAX_SIZE) or (unit not in _UNITS and unit != "%"):
            return False
    if name == "class":
        return _CLASS.fullmatch(value) is not None
    if name == "style":
        return all(part.partition(":")[0].strip() in STYLES for part in value.split(";") if part.strip())
    return True
