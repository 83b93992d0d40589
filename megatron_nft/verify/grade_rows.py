"""Rows with responses and answers, read from and written to JSONL and parquet without losing one.

JSONL is read as bytes: a line with invalid UTF-8 is still a row (the bytes become replacement characters), only a line
that is not a JSON object stops the reading, with its number. In parquet, text that is not UTF-8 is replaced as well.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

RESPONSE_COLUMNS = ("response", "text")  # `text` is what the project's rollout files call it
BATCH_ROWS = 1024
_MAX_JSON_DIGITS = 4000  # Python refuses to make longer integers from text


class RowsError(ValueError):
    """A file that cannot be read or written. The message names the file and, where there is one, the row."""


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl or .parquet file, in order."""
    if not path.is_file():
        raise RowsError(f"{path}: no such file")
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif path.suffix in (".jsonl", ".json"):
        yield from _read_jsonl(path)
    else:
        raise RowsError(f"{path}: files to grade end in .jsonl or .parquet, not in {path.suffix or 'nothing'!r}")


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8", errors="replace")
            if not line.strip():
                continue
            try:
                row = json.loads(line, parse_int=_integer)
            except (json.JSONDecodeError, RecursionError) as error:
                message = getattr(error, "msg", "nested too deeply")
                raise RowsError(f"{path}, line {number}: not JSON ({message}); one object per line") from None
            if not isinstance(row, dict):
                raise RowsError(
                    f"{path}, line {number}: a {type(row).__name__}, not an object with response and answer"
                )
            yield row


def _integer(digits: str) -> int | str:
    return int(digits) if len(digits) <= _MAX_JSON_DIGITS else digits


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                columns = [_values(column) for column in batch.columns]
                for values in zip(*columns, strict=True):
                    yield dict(zip(batch.schema.names, values, strict=True))
    except (pa.ArrowException, OSError) as error:
        raise RowsError(f"{path}: cannot be read as parquet ({error})") from None


def _values(column: Any) -> list[Any]:
    """The values of an Arrow column; text that is not UTF-8 with replacement characters."""
    import pyarrow as pa

    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        raw = column.view(pa.binary() if pa.types.is_string(column.type) else pa.large_binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", errors="replace") for value in raw]
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return [None if value is None else value.decode("utf-8", errors="replace") for value in column.to_pylist()]
    return column.to_pylist()


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
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if path.suffix == ".parquet":
            _write_parquet(partial, source, list(results))
        else:
            with partial.open("w", encoding="utf-8", errors="replace") as file:
                for row, result in zip(read_rows(source), results, strict=True):
                    file.write(json.dumps(row | result, ensure_ascii=False, default=str) + "\n")
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_parquet(path: Path, source: Path, results: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if source.suffix == ".parquet":
        table = pq.read_table(source)
    else:
        rows = list(read_rows(source))
        names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
        table = pa.table({name: _array([row.get(name) for row in rows]) for name in names})
    for name in results[0] if results else ():
        column = _array([result[name] for result in results])
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, column)
        else:
            table = table.append_column(name, column)
    pq.write_table(table, path)


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
