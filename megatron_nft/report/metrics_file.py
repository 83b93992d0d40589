"""Reads metrics.jsonl of a run that has ended or is still in progress."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the records in order of their steps, and notes on what was left out.

    A step that was repeated after a resume counts once, with its last record. Neither a missing file nor a damaged line
    is an error: the page says what it lacks. A last line without a line feed is being written and needs no note.
    """
    if not path.exists():
        return [], [f"{path.name} is not there yet"]
    records: dict[int, dict[str, Any]] = {}
    notes: list[str] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
            records[int(record["step"])] = record
        except (ValueError, KeyError, TypeError):
            if number < len(lines):  # the last line has no line feed: it is being written
                notes.append(f"{path.name}, line {number}: not a record with a step, left out")
    return [records[step] for step in sorted(records)], notes


def to_columns(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The records by column: {"step": [int], "scalars": {name: [number]}, "histograms": {name: [list]}}.

    A value that is missing in a record or is not finite is None: it leaves a gap in the curve.
    """
    scalars: dict[str, list[float | None]] = {}
    histograms: dict[str, list[list[Any] | None]] = {}
    for i, record in enumerate(records):
        for name, value in record.items():
            if name == "step":
                continue
            if isinstance(value, list):
                histograms.setdefault(name, [None] * len(records))[i] = value
            else:
                number = _number(value)
                if number is not None:
                    scalars.setdefault(name, [None] * len(records))[i] = number
    return {"step": [int(r["step"]) for r in records], "scalars": scalars, "histograms": histograms}


def _number(value: Any) -> float | None:
    """A finite number as it is; None for anything else, such as the text "nan" that the loop writes for NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if math.isfinite(value) else None
