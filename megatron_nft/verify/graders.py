"""Graders by name: the built-in ones, and a function of the user's own by dotted path.

A grader is called in a worker process as `grade(response, answer, data_source, extra)`.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

from megatron_nft.types import Verdict
from megatron_nft.verify.outcome import Graded, Outcome, combine, shorten

Grader = Callable[[str, str, str, dict[str, Any] | None], Outcome]

BUILTIN = {
    "math_verify": "megatron_nft.verify.maths.grade",
    "dapo_boxed": "megatron_nft.verify.dapo.grade_boxed",
    "dapo_minerva": "megatron_nft.verify.dapo.grade_minerva",
    "numeric": "megatron_nft.verify.numeric.grade",
}
GRADERS = tuple(BUILTIN)


class GraderError(ValueError):
    """A grader's name is unknown, or its function cannot be loaded."""


def split_names(graders: str) -> tuple[str, ...]:
    """`"math_verify,my.module.f"` -> ("math_verify", "my.module.f"). Nothing is imported."""
    names = tuple(name.strip() for name in graders.split(",") if name.strip())
    if not names:
        raise GraderError(f"no grader in {graders!r}: name at least one of {', '.join(GRADERS)} or a dotted path")
    for name in names:
        if _tolerance(name) is None and name not in BUILTIN and "." not in name:
            raise GraderError(f"unknown grader {name!r}: use one of {', '.join(GRADERS)}, or module.function")
    if len(set(names)) != len(names):
        raise GraderError(f"a grader is named twice in {graders!r}")
    return names


def _tolerance(name: str) -> float | None:
    """0.01 for "numeric:0.01"; None for any other grader."""
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
    """The grader called `name`. GraderError says what is missing."""
    tolerance = _tolerance(name)
    if tolerance is not None:
        return importlib.import_module(BUILTIN["numeric"].rpartition(".")[0]).with_tolerance(tolerance)
    path = BUILTIN.get(name, name)
    module_name, _, attribute = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise GraderError(f"grader {name}: cannot import {module_name}: {error}") from error
    except AttributeError as error:
        raise GraderError(f"grader {name}: {module_name} has no {attribute}") from error
    if not callable(function):
        raise GraderError(f"grader {name}: {path} is a {type(function).__name__}, not a function")
    return function if name in BUILTIN else _adapt(name, function)


def _adapt(name: str, function: Callable[..., Any]) -> Grader:
    """The user's function, whose bool or Verdict becomes an Outcome."""

    def grade(response: str, answer: str, data_source: str, extra: dict[str, Any] | None) -> Outcome:
        result = function(response, answer, data_source, extra)
        if isinstance(result, Outcome):
            return result
        if isinstance(result, Verdict):
            return Outcome(result, reason="" if result in (Verdict.CORRECT, Verdict.WRONG) else f"said by {name}")
        if isinstance(result, bool):
            return Outcome(Verdict.CORRECT if result else Verdict.WRONG)
        raise TypeError(f"{name} returned {result!r:.100}: a grader returns True, False or a Verdict")

    return grade


def call(grader: Grader, response: str, answer: str, data_source: str, extra: dict[str, Any] | None) -> Outcome:
    """The grader's outcome; a grader that raises gives `unparseable` with the reason, never a silent `wrong`.

    MemoryError is left to the caller: the process may no longer be in order.
    """
    try:
        return grader(response, answer, data_source, extra)
    except MemoryError:
        raise
    except RecursionError:
        return Outcome(Verdict.UNPARSEABLE, reason="nested too deeply")
    except Exception as error:
        return Outcome(Verdict.UNPARSEABLE, reason=f"the grader failed: {type(error).__name__}: {error}"[:500])


def grade_one(
    response: str,
    answer: str,
    grader: str = "math_verify",
    *,
    data_source: str = "",
    extra: dict[str, Any] | None = None,
    on_disagreement: str = "trust_first",
) -> Graded:
    """Grade in this process, without the bounds on time and memory that `VerifierPool` keeps."""
    names = split_names(grader)
    graders = [load(name) for name in names]
    start = time.perf_counter()
    outcomes = [call(grader, response, answer, data_source, extra) for grader in graders]
    outcomes = [Outcome(o.verdict, shorten(o.extracted), o.reason) for o in outcomes]
    return combine(names, outcomes, time.perf_counter() - start, on_disagreement)
