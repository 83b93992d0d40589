"""metrics.jsonl of a run, also of one in progress."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """(records by step, notes on what was left out). A last line without its end is a run in progress, not a fault.

    A step that was done again after a resume counts once, with its last record. Neither a missing file nor a damaged
    line is an error: the page says what it lacks.
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
    """{"step": [...], "scalars": {name: [number or null]}, "histograms": {name: [list or null]}}."""
    scalars: dict[str, list] = {}
    histograms: dict[str, list] = {}
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
    """A finite number; "nan" and "inf", as figures that are none are written, leave a gap in the curve."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if math.isfinite(value) else None
