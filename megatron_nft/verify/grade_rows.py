"""Rows with responses and answers, read from and written to JSONL and parquet without losing any.

A row whose text is not valid UTF-8 is kept, with replacement characters. Only a line that is not a JSON object stops
the reading; the error names it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_nft.files import RowsError, read_rows, replacing
from megatron_nft.verify.thinking import PROMPT_OPENS_THINKING, opens_thinking

RESPONSE_COLUMNS = ("response", "text")  # `text` is the column's name in the project's rollout files


def rows_to_grade(path: Path) -> Iterator[dict[str, Any]]:
    """Return the rows of a .jsonl or .parquet file in order. Raises RowsError for a file or row that cannot be read."""
    return (row for _, row in read_rows(path, replace_invalid_text=True))


def response_column(row: dict[str, Any], path: Path) -> str:
    """Return the name of the column that holds the responses, judging by the first row.

    Raises RowsError if there is none, or no column with answers.
    """
    name = next((column for column in RESPONSE_COLUMNS if column in row), None)
    if name is None or "answer" not in row:
        missing = "'response' (or 'text')" if name is None else "'answer'"
        columns = ", ".join(map(repr, row)) or "none"
        raise RowsError(f"{path}, row 1: column {missing} is missing; columns found: {columns}")
    return name


def opens_thinking_in(row: dict[str, Any]) -> bool:
    """Whether the prompt of a row ends in `<think>`.

    `prompt_opens_thinking` says so, or a text in `prompt`, or the assistant's turn that ends the messages in `prompt`.
    """
    if isinstance(said := row.get(PROMPT_OPENS_THINKING), bool):
        return said
    prompt = row.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(last := prompt[-1], dict) and last.get("role") == "assistant":
        prompt = last.get("content")
    return isinstance(prompt, str) and opens_thinking(prompt)


def as_text(value: Any) -> str | None:
    """Return an answer as the text that graders expect; None for null and for mappings, also within lists."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):  # several answers
        parts = [text for part in value if (text := as_text(part)) is not None]
        return ", ".join(parts) if len(parts) == len(value) else None
    if value is None or isinstance(value, dict) or value != value:  # NaN is what pandas writes for null
        return None
    return str(value)


def write_rows(path: Path, source: Path, results: Iterable[dict[str, Any]]) -> None:
    """Write the rows of `source`, each with its columns from `results`, to `path`: all of them or nothing.

    A column of the source that has the name of a result is replaced. From parquet to parquet the other columns keep
    their types.
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
    """Return an Arrow array; values of mixed types become JSON text."""
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):
        return pa.array([None if value is None else _json_text(value) for value in values], pa.string())


def _json_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.encode("utf-8", "replace").decode()
