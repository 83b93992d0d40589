"""Graders by name: the built-in ones, and the user's own functions by dotted path.

A worker process calls a grader as `grade(response, answer, data_source, extra)`.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
import warnings
from collections.abc import Callable
from typing import Any

from megatron_nft.types import ReasonKind, Verdict
from megatron_nft.verify.outcome import Graded, Outcome, combine, shorten
from megatron_nft.verify.thinking import with_opened

Grader = Callable[[str, str, str, dict[str, Any] | None], Outcome]

BUILTIN = {
    "maths": "megatron_nft.verify.maths.grade",
    "math_verify_plain": "megatron_nft.verify.math_verify_plain.grade",
    "dapo_boxed": "megatron_nft.verify.dapo.grade_boxed",
    "dapo_minerva": "megatron_nft.verify.dapo.grade_minerva",
    "numeric": "megatron_nft.verify.numeric.grade",
}
GRADERS = tuple(BUILTIN)
RULES = 2
"""Goes up when a built-in grader judges some answers otherwise than before. It stands in the protocol of an evaluation,
so that results of different rules are not compared unnoticed; 1 was not written down."""
FORMER_NAMES = {"math_verify": "maths"}
"""Former name -> name. The former name is still accepted, with a warning, and stands in files written under it."""


class GraderError(ValueError):
    """A grader's name is unknown, or its function cannot be loaded."""


def split_names(graders: str) -> tuple[str, ...]:
    """Split `"maths,my.module.f"` into ("maths", "my.module.f"), with former names replaced; nothing is imported.

    Raises GraderError for an unknown name, a name given twice, or none at all. Warns about former names, once each.
    """
    given = tuple(name.strip() for name in graders.split(",") if name.strip())
    if not given:
        raise GraderError(f"no grader in {graders!r}: name at least one of {', '.join(GRADERS)} or a dotted path")
    for name in given:
        if name in FORMER_NAMES:
            warnings.warn(f"the grader {name} is now called {FORMER_NAMES[name]}", FutureWarning, stacklevel=1)
    names = tuple(current_name(name) for name in given)
    for name in names:
        if _tolerance(name) is None and name not in BUILTIN and "." not in name:
            raise GraderError(f"unknown grader {name!r}: use one of {', '.join(GRADERS)}, or module.function")
    if len(set(names)) != len(names):
        former = [f"{name} is the former name of {FORMER_NAMES[name]}" for name in given if name in FORMER_NAMES]
        raise GraderError("; ".join([f"a grader is named twice in {graders!r}", *dict.fromkeys(former)]))
    return names


def current_name(name: str) -> str:
    """Return the name by which a grader is known today; other names, known or not, are returned unchanged."""
    return FORMER_NAMES.get(name, name)


def _tolerance(name: str) -> float | None:
    """Return 0.01 for "numeric:0.01"; None for any other grader. Raises GraderError for an impossible tolerance."""
    kind, colon, number = name.partition(":")
    if kind != "numeric" or not colon:
        return None
    try:
        tolerance = float(number)
    except ValueError:
        tolerance = -1.0
    if not 0 <= tolerance < 1:
        raise GraderError(f"grader {name}: the relative tolerance must be a number in [0, 1), not {number!r}")
    return tolerance


def load(name: str) -> Grader:
    """Import the grader called `name`. Raises GraderError, which says what is missing."""
    name = current_name(name)
    tolerance = _tolerance(name)
    if tolerance is not None:
        from megatron_nft.verify.numeric import with_tolerance

        return with_tolerance(tolerance)
    function = load_function(BUILTIN.get(name, name), f"grader {name}", GraderError)
    return function if name in BUILTIN else _adapt(name, function)


def load_function(path: str, what: str, error: type[ValueError]) -> Callable[..., Any]:
    """Import the function with the dotted `path`. Raises `error`, which begins with `what` and says what is missing."""
    module_name, _, attribute = path.rpartition(".")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module_name), attribute)
    except ImportError as caught:
        raise error(f"{what}: cannot import {module_name}: {caught}") from caught
    except AttributeError as caught:
        raise error(f"{what}: {module_name} has no {attribute}") from caught
    if not callable(function):
        raise error(f"{what}: {path} is a {type(function).__name__}, not a function")
    return function


def _adapt(name: str, function: Callable[..., Any]) -> Grader:
    """Wrap the user's function, so that the bool, number or Verdict that it returns becomes an Outcome."""

    def grade(response: str, answer: str, data_source: str, extra: dict[str, Any] | None) -> Outcome:
        try:
            result = function(response, answer, data_source, extra)
        except RecursionError as error:  # of a built-in grader it is the answer's fault
            raise RuntimeError(f"RecursionError: {error}") from error
        if isinstance(result, Outcome):
            silent = result.verdict not in (Verdict.CORRECT, Verdict.WRONG) and not result.reason
            return dataclasses.replace(result, reason=f"said by {name}") if silent else result
        if isinstance(result, Verdict):
            return Outcome(result, reason="" if result in (Verdict.CORRECT, Verdict.WRONG) else f"said by {name}")
        if isinstance(result, bool):
            return Outcome(Verdict.CORRECT if result else Verdict.WRONG)
        if isinstance(result, float) and 0 <= result <= 1:
            return Outcome(Verdict.CORRECT if result >= 0.5 else Verdict.WRONG, reward=result)
        raise TypeError(
            f"{name} returned {result!r:.100}: a grader returns True, False, a float in [0, 1] or a Verdict"
        )

    return grade


def call(grader: Grader, response: str, answer: str, data_source: str, extra: dict[str, Any] | None) -> Outcome:
    """Call a grader. If it raises, the outcome is `no_verdict` with the reason, never a silent `wrong`.

    An answer that is nested too deeply for a built-in grader is `unparseable`. MemoryError is left to the caller,
    because the process may be in an unknown state.
    """
    try:
        return grader(response, answer, data_source, extra)
    except MemoryError:
        raise
    except RecursionError:
        return Outcome(Verdict.UNPARSEABLE, reason="nested too deeply")
    except Exception as error:
        reason = f"the grader failed: {type(error).__name__}: {error}"[:500]
        return Outcome(Verdict.NO_VERDICT, reason=reason, kind=ReasonKind.GRADER_FAILED)


def grade_one(
    response: str,
    answer: str,
    grader: str = "maths",
    *,
    data_source: str = "",
    extra: dict[str, Any] | None = None,
    on_disagreement: str = "trust_first",
    prompt_opens_thinking: bool = False,
) -> Graded:
    """Grade in this process, without the limits on time and memory that `VerifierPool` enforces.

    grader: one or several names, comma-separated, as in `verify.grader`. prompt_opens_thinking: as in
    `VerifierPool.submit`.
    """
    if prompt_opens_thinking:
        extra = with_opened(extra)
    names = split_names(grader)
    graders = [load(name) for name in names]
    start = time.perf_counter()
    outcomes = [call(grader, response, answer, data_source, extra) for grader in graders]
    outcomes = [dataclasses.replace(o, extracted=shorten(o.extracted)) for o in outcomes]
    return combine(names, outcomes, time.perf_counter() - start, on_disagreement)
