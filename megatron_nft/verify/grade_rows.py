"""Rows with responses and answers, read from and written to JSONL and parquet without losing one.

JSONL is read as bytes: a line with invalid UTF-8 is still a row (the bytes become replacement characters), only a line
that is not a JSON object stops the reading, with its number. In parquet, text that is not UTF-8 is replaced as well.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_nft.files import RowsError, read_rows, replacing

RESPONSE_COLUMNS = ("response", "text")  # `text` is what the project's rollout files call it


def rows_to_grade(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl or .parquet file, in order; text that is not UTF-8 does not cost a row (files.read_rows)."""
    return (row for _, row in read_rows(path, replace_invalid_text=True))


def response_column(row: dict[str, Any], path: Path) -> str:
    """The column that holds the responses, told by the first row. RowsError where a column is missing."""
    name = next((column for column in RESPONSE_COLUMNS if column in row), None)
    for needed, found in (("response", name is not None), ("answer", "answer" in row)):
        if not found:
            also = " (or 'text')" if needed == "response" else ""
            columns = ", ".join(map(repr, row)) or "none"
            raise RowsError(f"{path}, row 1: column {needed!r}{also} is missing; columns found: {columns}")
    return name


def as_text(value: Any) -> str | None:
    """An answer as the graders want it; None for null and for what has no text: mappings, lists of mappings."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):  # several answers
        parts = [as_text(part) for part in value]
        return None if None in parts else ", ".join(parts)
    if value is None or isinstance(value, dict) or value != value:  # NaN is what pandas writes for null
        return None
    return str(value)


def write_rows(path: Path, source: Path, results: Iterable[dict[str, Any]]) -> None:
    """Write the rows of `source` with one of `results` each: all of them or nothing.

    From parquet to parquet the columns of the source keep their types; a column of a result's name is replaced.
    """
    with replacing(path) as file:
        if path.suffix == ".parquet":
            _write_parquet(file, source, list(results))
        else:
            for row, result in zip(rows_to_grade(source), results, strict=True):
                line = json.dumps(row | result, ensure_ascii=False, default=str) + "\n"
                file.write(line.encode("utf-8", errors="replace"))


def _write_parquet(file: BinaryIO, source: Path, results: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if source.suffix == ".parquet":
        table = pq.read_table(source)
    else:
        rows = list(rows_to_grade(source))
        names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
        table = pa.table({name: _array([row.get(name) for row in rows]) for name in names})
    for name in results[0] if results else ():
        column = _array([result[name] for result in results])
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, column)
        else:
            table = table.append_column(name, column)
    pq.write_table(table, file)


def _array(values: list[Any]) -> Any:
    """An Arrow array; values of mixed types as JSON text."""
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):
        return pa.array([None if value is None else _json_text(value) for value in values], pa.string())


def _json_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.encode("utf-8", "replace").decode()
