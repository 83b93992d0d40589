"""The spelling of sympy and of Python lists, in the notation that the parser reads.

`Rational(7, 3)` becomes `((7)/(3))`, `factorial(5)` becomes `(5)!` and `[[1, 0], [0, 1]]` a matrix.
"""

from __future__ import annotations

import re
from collections.abc import Callable

MAX_CALLS = 50  # more calls than these are left as they are
MAX_CELLS = 400  # of a matrix that is given by its size

_call = re.compile(
    r"(?<![\w\\.])(?:(?:sp|sympy|np|numpy)\.)?(factorial|binomial|Rational|Fraction|Integer|Float|Matrix|FiniteSet|Abs|Pow|Mul|Add|S(?=\(\d)|Eq|Tuple"
    r"|Interval(?:\.open|\.Lopen|\.Ropen)?|Union|Max|Min|root|Point|Gt|Ge|Lt|Le|Ne"
    r"|(?:Mutable|Immutable)(?:Dense)?Matrix|array|eye|zeros|diag|Sum|Product|Integral|Limit"
    r"|log(?=\([^()]*,[^()]*\)))\s*\("
)
_any_call = re.compile(r"[A-Za-z]\s*\(")
_imaginary = re.compile(
    r"(?<=[-+])\s*I(?![A-Za-z_(])|(?<![A-Za-z\\])I(?=\s*[-+])|(?<=\*)\s*I(?![A-Za-z])|(?<![A-Za-z\\])I\s*(?=\*|/\d)"
)
_euler = re.compile(r"(?<=\*)\s*E(?![A-Za-z])|(?<![A-Za-z\\])E\s*(?=\*|\^)")


def _joined(sign: str) -> Callable[[list[str]], str | None]:
    return lambda values: "(" + sign.join(f"({value})" for value in values) + ")" if values else None


def _two(pattern: str) -> Callable[[list[str]], str | None]:
    return lambda values: pattern.format(*values) if len(values) == 2 else None


def _one(pattern: str) -> Callable[[list[str]], str | None]:
    return lambda values: pattern.format(*values) if len(values) == 1 else None


def _rational(values: list[str]) -> str | None:
    parts = [value.strip("'\"") for value in values]  # Rational('1/2')
    return "(" + "/".join(f"({part})" for part in parts) + ")" if 0 < len(parts) < 3 else None


def _matrix_call(values: list[str]) -> str | None:
    """Write `[[1, 2], [3, 4]]`, the column `[1, 2]` or `2, 2, [1, 2, 3, 4]` as a matrix."""
    if len(values) == 1:
        return nested_list(values[0]) or _column(values[0])
    if len(values) != 3 or not (values[0].isdigit() and values[1].isdigit()):
        return None
    rows, columns, cells = int(values[0]), int(values[1]), _elements(values[2]) or []
    if not rows * columns == len(cells) <= MAX_CELLS:
        return None
    return _matrix([cells[start : start + columns] for start in range(0, len(cells), columns)])


def _diagonal(values: list[str]) -> str | None:
    size = len(values)
    if not 0 < size * size <= MAX_CELLS:
        return None
    return _matrix([[value if row == column else "0" for column in range(size)] for row, value in enumerate(values)])


def _identity(values: list[str]) -> str | None:
    size = int(values[0]) if len(values) == 1 and values[0].isdigit() and len(values[0]) < 3 else 0
    return _diagonal(["1"] * size)


def _zeros(values: list[str]) -> str | None:
    if len(values) not in (1, 2) or not all(value.isdigit() and len(value) < 3 for value in values):
        return None
    rows, columns = int(values[0]), int(values[-1])
    return _matrix([["0"] * columns] * rows) if 0 < rows * columns <= MAX_CELLS else None


def _over_a_range(pattern: str, without_bounds: str = "") -> Callable[[list[str]], str | None]:
    """Write `Sum(k, (k, 1, n))` by `pattern`, and `Integral(x, x)` by the other one."""

    def written(values: list[str]) -> str | None:
        if len(values) != 2:
            return None
        inner = values[1].strip()
        bounds = split_arguments(inner[1:-1]) if inner[:1] == "(" and inner[-1:] == ")" else [inner]
        if len(bounds) == 1 and without_bounds:
            return without_bounds.format(values[0], *bounds)
        return pattern.format(values[0], *bounds) if len(bounds) == 3 else None

    return written


def _limit(values: list[str]) -> str | None:
    return rf"\lim_{{{values[1]} \to {values[2]}}} ({values[0]})" if len(values) == 3 else None


def _matrix(rows: list[list[str]]) -> str:
    return r"\begin{pmatrix}" + r" \\ ".join(" & ".join(row) for row in rows) + r"\end{pmatrix}"


def _interval(values: list[str]) -> str | None:
    if len(values) != 2:
        return None
    return f"{'(' if values[0] == '-oo' else '['}{values[0]}, {values[1]}{')' if values[1] == 'oo' else ']'}"


def _set(values: list[str]) -> str:
    return r"\{" + ", ".join(values) + r"\}"


_WRITTEN: dict[str, Callable[[list[str]], str | None]] = {
    "factorial": _one("(({0})!)"), "binomial": _two(r"\binom{{{0}}}{{{1}}}"), "Rational": _rational,
    "Fraction": _rational,
    "Gt": _two("{0} > {1}"), "Ge": _two("{0} >= {1}"), "Lt": _two("{0} < {1}"), "Le": _two("{0} <= {1}"),
    "Ne": _two("{0} != {1}"),
    "Integer": _one("({0})"), "Float": _one("({0})"), "S": _one("({0})"), "Abs": _one(r"\abs({0})"),
    "Pow": _two("(({0})^{{{1}}})"), "Mul": _joined("*"), "Add": _joined("+"), "Eq": _two("{0} = {1}"),
    "Matrix": _matrix_call, "array": _matrix_call, "eye": _identity, "zeros": _zeros, "diag": _diagonal,
    **{f"{kind}Matrix": _matrix_call for kind in ("Mutable", "Immutable", "MutableDense", "ImmutableDense")},
    "Sum": _over_a_range(r"\sum_{{{1}={2}}}^{{{3}}} ({0})"),
    "Product": _over_a_range(r"\prod_{{{1}={2}}}^{{{3}}} ({0})"),
    "Integral": _over_a_range(r"\int_{{{2}}}^{{{3}}} ({0}) d{1}", r"\int ({0}) d{1}"), "Limit": _limit,
    "log": _two(r"\log_{{{1}}}({0})"), "FiniteSet": _set, "Interval": _interval,
    "Interval.open": _two("({0}, {1})"), "Interval.Lopen": _two("({0}, {1}]"), "Interval.Ropen": _two("[{0}, {1})"),
    "Union": r" \cup ".join, "root": _two(r"\sqrt[{1}]{{{0}}}"),
    "Tuple": lambda values: f"({', '.join(values)})", "Point": lambda values: f"({', '.join(values)})",
    "Max": lambda values: rf"\max({', '.join(values)})", "Min": lambda values: rf"\min({', '.join(values)})",
}  # fmt: skip


def plain_calls(text: str) -> str:
    """Return a text in which calls of sympy's functions are written as mathematics, from the innermost out."""
    if not _any_call.search(text):
        return text
    for _ in range(MAX_CALLS):
        *_, last = [None, *(match for match in _call.finditer(text) if match[1] in _WRITTEN)]
        end = _closing(text, last.end()) if last is not None else -1
        if last is None or end < 0:
            return text
        written = _WRITTEN[last[1]](split_arguments(text[last.end() : end]))
        if written is None:
            return text
        text = text[: last.start()] + written + text[end + 1 :]
    return text


def nested_list(text: str) -> str | None:
    r"""Write `[[1, 0], [0, 1]]` as a matrix in LaTeX; None for anything else."""
    rows = _elements(text)
    cells = [_elements(row) for row in rows or []]
    if not cells or not all(cells):
        return None
    return _matrix([row or [] for row in cells])


def other_constants(text: str) -> str:
    """Return `2*I` as `2*i` and `2*E` as `2*e`: letters of a product that is written as in Python."""
    return _euler.sub("e", _imaginary.sub("i", text))


def _column(text: str) -> str | None:
    cells = _elements(text)
    return _matrix([[cell] for cell in cells]) if cells else None


def _elements(text: str) -> list[str] | None:
    """Return the elements of a list in square brackets; None for anything else."""
    text = text.strip()
    if not text.startswith("[") or _closing(text, 1) != len(text) - 1:
        return None
    return split_arguments(text[1:-1])


def split_arguments(text: str) -> list[str]:
    """Split at the commas outside brackets; no parts at all of an empty text."""
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def _closing(text: str, start: int) -> int:
    """Return the index of the bracket that closes the one before `start`; -1 if there is none."""
    depth = 1
    for index in range(start, len(text)):
        depth += (text[index] in "([{") - (text[index] in ")]}")
        if depth == 0:
            return index
    return -1
