"""Answer keys: what a source means by its boxes, its numbers and what it leaves empty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from megatron_nft.data.rows import NAN_TEXT, DataError, is_nan_text, is_text, shown
from megatron_nft.files import JsonFloat
from megatron_nft.verify.boxed import last_box, last_boxes

EXACT_FLOATS = 2.0**53  # below it a whole number of a parquet file is known to its last digit


class MissingAnswerError(DataError):
    """An answer column that holds null, NaN or an infinity. The message lacks file and row."""


def answer_text(value: Any) -> str:
    """Return the ground truth as text: ['2', '3'] -> '2, 3'.

    A number of a JSON file keeps its text: 6.02e23 -> '6.02e23', 2.50 -> '2.50', 27.0 -> '27.0'; so does one of a
    decimal column of parquet. A binary number has no text: 27.0 -> '27'. MissingAnswerError for null, NaN (as text too)
    and infinities, ValueError for booleans, mappings and empty texts.
    """
    if isinstance(value, str) and value.strip():
        if is_nan_text(value):
            raise MissingAnswerError(f"the answer is {NAN_TEXT}")
        return value.strip()
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        return _number_text(value)
    if value is None:
        raise MissingAnswerError("the answer is None (null); there is nothing that a response could match")
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        return ", ".join(answer_text(v) for v in value)
    raise ValueError(f"the answer is {shown(value)}; a text, a number or a list of them is needed")


def _number_text(value: int | float | Decimal) -> str:
    if isinstance(value, int):
        return str(value)
    if isinstance(value, JsonFloat):
        return value.text
    if isinstance(value, Decimal):
        return f"{value:f}"  # 0.00000000, where str() says 0E-8
    if not math.isfinite(value):
        raise MissingAnswerError(f"the answer is {value} (a number); there is nothing that a response could match")
    return str(int(value)) if value.is_integer() and abs(value) < EXACT_FLOATS else repr(value)


def answer_of_solution(solution: Any) -> str:
    r"""Return what the last complete `\boxed{}` of a solution holds, together with the other boxes of its sentence.

    ValueError if there is none, MissingAnswerError for null and NaN in place of the solution.
    """
    solution = solution_text(solution, "solution")
    answer = last_boxes(solution)
    if answer is not None and "%" not in (last_box(solution) or ""):
        answer = answer.removesuffix("\\%")  # stands behind the box, not in it
    if answer is None:
        raise ValueError(f"no complete \\boxed{{}} in {solution[-60:]!r}")
    return answer.strip()


def ground_truth(row: dict[str, Any]) -> str:
    """Return the answer of a row in verl's layout. Errors as of `answer_text`, ValueError where there is none."""
    model = row.get("reward_model")
    if model is None:
        raise MissingAnswerError("reward_model is None (null); there is nothing that a response could match")
    if not isinstance(model, dict) or "ground_truth" not in model:
        raise ValueError(f"reward_model is {shown(model)}; it has no ground_truth, as verl's layout has it")
    return answer_text(model["ground_truth"])


def solution_text(value: Any, column: str) -> str:
    """Return a text that an answer is taken from. MissingAnswerError for null and NaN, ValueError for no text."""
    if value is None or (isinstance(value, float) and not math.isfinite(value) and not isinstance(value, JsonFloat)):
        raise MissingAnswerError(f"column {column} is {value}; there is no answer that a response could match")
    return text_of(value, column)


def text_of(value: Any, column: str) -> str:
    """Return the text in a column. ValueError for an empty one and for anything else."""
    if not is_text(value):
        raise ValueError(f"column {column} holds {shown(value)}, not a text")
    if not value.strip():
        raise ValueError(f"column {column} is empty")
    return str(value)
