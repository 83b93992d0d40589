r"""Whether two quantities are the same: numbers or expressions, with their unit, percent sign or base.

A unit, a percent sign or a base may be left out, but must not differ. A decimal of six or more significant digits
stands for every number that rounds to it.
"""

from __future__ import annotations

from fractions import Fraction

from megatron_nft.verify.algebra.comparison import same_value, value_at_a_point
from megatron_nft.verify.algebra.exact import exact
from megatron_nft.verify.algebra.tree import Tree, Written
from megatron_nft.verify.algebra.units import canonical
from megatron_nft.verify.algebra.values import symbols

_LETTER_UNITS = frozenset("mgshJNWVKL")
_PI: Tree = ("s", "\\pi")
MIN_DIGITS = 6  # from this many significant digits on, a decimal stands for the number that rounds to it
MIN_PLACES = 3  # likewise in a point or an interval
MAX_DECIMALS = 3000  # a number of more digits is not rounded
_TOO_MANY = 10**MAX_DECIMALS
_NUMBERS = frozenset(("s", "/", "root", "+", "*", "-", "^", "f", "log"))


def same_quantity(gold: Tree, found: Tree) -> bool:
    """Whether `found` is the same number or expression as `gold`; each may have a unit, a percent sign or a base.

    Raises Undecided where a value cannot be computed.
    """
    gold_unit, found_unit = _unit(gold), _unit(found)
    if gold_unit and found_unit and gold_unit != found_unit:
        return gold[0] == "unit" and found[0] == "unit" and _doubled_unit(gold, found)
    gold_value, found_value = _without_unit(gold), _without_unit(found)
    if _same_number(gold_value, found_value):
        return True
    if (gold_value[0] == "pct") != (found_value[0] == "pct"):
        return _same_but_for_percent(gold_value, found_value)
    if gold_value[0] == "base" and found_value[0] == "n":  # 52 for 52_8, like a unit that is left out
        return bool(found_value[1] < _TOO_MANY and str(found_value[1]) == gold_value[1])
    if (gold_unit == "deg") != (found_unit == "deg") and _same_angle(gold, found):
        return True
    if not found_unit and exact(gold_value) is not None:
        with_unit = with_letter_unit(found_value)  # 5 m for 5, and for 5 \text{m}
        return with_unit is not None and gold_unit in ("", with_unit[2]) and _same_number(gold_value, with_unit[1])
    if gold_value[0] == "*" and found[0] == "unit" and len(found_unit) == 1:  # 5 \text{m} for 5 m
        return _same_number(gold_value, ("*", found_value, ("s", found_unit)))
    return False


def _unit(tree: Tree) -> str:
    return tree[2] if tree[0] == "unit" else ""


def _without_unit(tree: Tree) -> Tree:
    return tree[1] if tree[0] == "unit" else tree


def with_letter_unit(tree: Tree) -> Tree | None:
    """Turn `5 m`, read as five times m, into the quantity 5 m, likewise `3 m/s^2`; None if it cannot be a quantity."""
    below = _letter(tree[2]) if tree[0] == "/" else ""
    product = tree[1] if below else tree
    if product[0] != "*" or not (above := _letter(product[-1])) or any(symbols(part) for part in product[1:-1]):
        return None
    number = product[1] if len(product) == 3 else product[:-1]
    return ("unit", number, canonical(f"{above}/{below}" if below else above))


def _letter(tree: Tree) -> str:
    """Return `m` or `s^2` if the tree is a letter that can be a unit, else the empty string."""
    name, power = tree, None
    if tree[0] == "^":
        name, power = tree[1], exact(tree[2])
        if power is None or power.denominator != 1:
            return ""
    if name[0] != "s" or name[1] not in _LETTER_UNITS:
        return ""
    return name[1] if power is None else f"{name[1]}^{power}"


def _same_angle(gold: Tree, found: Tree) -> bool:
    r"""Whether one is `30^\circ` and the other `\frac{\pi}{6}`. A number without pi is not taken for radians."""
    degrees, radians = (gold, found) if gold[0] == "unit" else (found, gold)
    if radians[0] == "unit" or not _has_pi(radians):
        return False
    return same_value(("/", ("*", degrees[1], _PI), ("n", Fraction(180))), radians)


def _has_pi(tree: Tree) -> bool:
    return tree == _PI or any(_has_pi(part) for part in tree[1:] if isinstance(part, tuple))


def _same_but_for_percent(gold: Tree, found: Tree) -> bool:
    """62.5 for 62.5%, or 62.5% for 62.5: the sign may be left out, or added where the reference may lack it."""
    if gold[0] == "pct":
        return _same_number(gold[1], found)
    number = exact(gold)
    return number is not None and abs(number) > 1 and _same_number(gold, found[1])


def _doubled_unit(gold: Tree, found: Tree) -> bool:
    r"""`90^\circ \text{ degrees}` for `90^\circ`: the unit followed by a repetition of it."""
    return found[2].startswith(f"{gold[2]} ") and _same_number(gold[1], found[1])


def _same_number(gold: Tree, found: Tree) -> bool:
    return same_value(gold, found) or _rounds_to(gold, found) or _rounds_to(found, gold)


def is_rounded(gold: Tree, found: Tree) -> bool:
    """Whether `found` is the decimal to which the fraction or root `gold` rounds, to MIN_PLACES places or more.

    For the coordinates of points and the ends of intervals, which are rounded where the same number alone is not.
    """
    gold, found = _without_unit(gold), _without_unit(found)
    is_decimal = gold[0] == "-" and gold[1][0] == "n"
    return gold[0] in _NUMBERS and not is_decimal and _rounds_to(gold, found, digits=MIN_PLACES, places=MIN_PLACES)


def _rounds_to(value: Tree, decimal: Tree, digits: int = MIN_DIGITS, places: int = 0) -> bool:
    """Whether `value` is a constant that rounds to `decimal`, which has so many digits and decimal places at least."""
    number = exact(decimal)
    if number is None or number == 0 or number.denominator == 1 or symbols(value):
        return False
    found_digits, found_places = _decimal_digits(number)
    if found_digits < digits or found_places < places:
        return False
    written = decimal[1][1] if decimal[0] == "-" else decimal[1]
    if isinstance(written, Written):  # 1.7320 is not what the root of 3 rounds to
        found_places = written.places
    number_of_value = value_at_a_point(value)
    if number_of_value is None:
        return False
    from_exact = exact(value)
    if from_exact is not None:
        return abs(from_exact - number) <= Fraction(1, 2 * 10**found_places)
    return bool(abs(number_of_value * 10**found_places - int(number * 10**found_places)) <= 0.5)


def _decimal_digits(number: Fraction) -> tuple[int, int]:
    """Return the significant digits and decimal places of a number.

    They are (0, 0) for a number such as 1/3, whose decimals do not end, and for one of too many digits.
    """
    twos = (number.denominator & -number.denominator).bit_length() - 1
    fives, rest = 0, number.denominator >> twos
    while rest % 5 == 0:
        rest //= 5
        fives += 1
    places = max(twos, fives)
    if rest != 1 or places >= MAX_DECIMALS:
        return 0, 0
    digits = abs(number.numerator) * 10**places // number.denominator
    return (len(str(digits)), places) if digits < _TOO_MANY else (0, 0)
