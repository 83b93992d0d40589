"""Files and folders: written whole or not at all, digests, rows of JSONL and parquet, files of the Hugging Face hub.

Writing has one rule. The content goes into a hidden file in the same folder, `.NAME.PID.partial`, which is flushed to
disk and then takes the name in one step; afterwards the folder is flushed too. Whoever reads the name, at any moment
and after a loss of power, finds the whole new file or the whole old one. A write that fails removes what it began; the
file that a killed process leaves is hidden and ends in `.partial`, so no pattern of finished files matches it.
A folder is filled under another name by whoever writes it, and `publish_folder` gives it its own.

Imports no torch; pyarrow and huggingface_hub are imported where they are used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

BLOCK_BYTES = 1 << 20  # read at a time for a digest
BATCH_ROWS = 1024  # parquet rows held at a time
_MAX_JSON_DIGITS = 4000  # Python refuses to make longer integers from text


class RowsError(ValueError):
    """A file whose rows cannot be read. The message names the file and, where there is one, the row."""


class HubError(ValueError):
    """A file that cannot be had from the Hugging Face hub. The message names data set and file."""


class JsonFloat(float):
    """A number of a JSON file, with the digits that it has there: 6.02e23 is not 6.02e+23 to a reader."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> JsonFloat:
        """Read a number as it is written."""
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __getnewargs__(self) -> tuple[str]:  # type: ignore[override]  # pickle asks for the arguments of __new__
        """The arguments that make it again in another process."""
        return (self.text,)


class LongInteger(str):
    """The digits of an integer of a JSON file that is too long to become one in Python; no text to people."""

    __slots__ = ()


def flush_to_disk(path: Path) -> None:
    """Return once a file's content, or a folder's list of names, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends without an error; the folder must exist.

    For writers that stream; `write_atomically` is for what is in memory. Two processes may write the same path at once
    (the last one wins), two threads of one process may not.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        flush_to_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` to `path`, whole or not at all; the folder must exist.

    Text becomes UTF-8. Lone surrogates, which models do write and UTF-8 cannot hold, become question marks: one of
    them must not cost the file.
    """
    with replacing(path) as file:
        file.write(content.encode("utf-8", errors="replace") if isinstance(content, str) else content)


def publish_folder(partial: Path, out: Path) -> None:
    """Flush the finished folder `partial` to disk and give it the name `out`, replacing a folder of that name.

    Both are in the same folder. No one ever finds half a folder under `out`. A folder has to be empty before another
    can be renamed onto it, so the one that is replaced is first renamed to `NAME.old`, and is removed when the new one
    has its name and that is on disk. Where the process is killed between the two renames, `out` is absent, the earlier
    folder is whole under `NAME.old` and the new one whole under `partial`; the next call for `out` removes `NAME.old`
    once it has published. OSError if something cannot be written or renamed; the earlier folder then has its name.
    """
    for folder, _, names in os.walk(partial, topdown=False):
        for name in names:
            flush_to_disk(Path(folder, name))
        flush_to_disk(Path(folder))
    old = out.with_name(out.name + ".old")
    replaces = out.exists()
    if replaces:
        if old.exists():  # left by a killed process, while `out` is whole
            shutil.rmtree(old)
        os.rename(out, old)
    try:
        os.rename(partial, out)
    except OSError:
        if replaces:
            os.rename(old, out)
        raise
    flush_to_disk(out.parent)
    if old.exists():
        shutil.rmtree(old)


def sha256_of_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """The SHA-256 of a file's content in hexadecimal; `on_bytes` is told how many more bytes were read."""
    digest, buffer = hashlib.sha256(), bytearray(BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            if on_bytes is not None:
                on_bytes(count)
    return digest.hexdigest()


def read_rows(path: Path, *, replace_invalid_text: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, values by column) of every row of a .jsonl (also .json) or .parquet file of any columns.

    In JSONL a row is a line, empty lines are passed over, integers too long for Python are `LongInteger`s, and numbers
    that are no integers are `JsonFloat`s, which know how they are written. In parquet a number of 32 or 16 bits is the
    shortest decimal that stands for it: 0.1, not 0.10000000149011612. Text that is not UTF-8 is refused or, with
    `replace_invalid_text`, gets replacement characters so that the row is not lost. RowsError where the file cannot be
    read, ends in anything else, or a line holds no JSON object.
    """
    if path.suffix == ".parquet":
        yield from _read_parquet(path, replace_invalid_text)
    elif path.suffix in (".jsonl", ".json"):
        yield from _read_jsonl(path, "replace" if replace_invalid_text else "strict")
    else:
        raise RowsError(f"{path}: files of rows end in .jsonl or .parquet, not in {path.suffix or 'nothing'!r}")


def _read_jsonl(path: Path, errors: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise RowsError(f"{path}: cannot be read ({error.strerror or error})") from None
    with file:
        offset = 0
        # As bytes: text files also end a line at U+2028 and its like, which JSON strings may hold.
        for number, raw in enumerate(file, start=1):
            where = f"{path}, row {number}"
            try:
                line = raw.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8", errors)
                row = json.loads(line, parse_int=_integer, parse_float=JsonFloat) if line.strip() else None
            except UnicodeDecodeError as error:
                position = offset + error.start
                raise RowsError(f"{where}: not UTF-8 text (byte {position}); save the file as UTF-8") from None
            except json.JSONDecodeError as error:
                problem = f"{error.msg} at character {error.pos + 1}"
                raise RowsError(f"{where}: not JSON ({problem}); one object per line") from None
            except RecursionError:
                raise RowsError(f"{where}: not JSON (nested too deeply); one object per line") from None
            offset += len(raw)
            if isinstance(row, dict):
                yield number, row
            elif line.strip():
                raise RowsError(f"{where}: a {type(row).__name__}, not an object with columns")


def _integer(digits: str) -> int | LongInteger:
    return int(digits) if len(digits) <= _MAX_JSON_DIGITS else LongInteger(digits)


def _read_parquet(path: Path, replace_invalid_text: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                columns = [_values(c, replace_invalid_text) for c in batch.columns]
                for values in zip(*columns, strict=True):
                    number += 1
                    yield number, dict(zip(batch.schema.names, values, strict=True))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise RowsError(f"{path}: cannot be read as parquet, after row {number} ({error})") from None


def _values(column: Any, replace_invalid_text: bool) -> list[Any]:
    """The values of an Arrow column; text that is not UTF-8 with replacement characters where that is asked for."""
    import pyarrow as pa

    if pa.types.is_float32(column.type) or pa.types.is_float16(column.type):
        kind = column.type.to_pandas_dtype()
        return [None if value is None else float(str(kind(value))) for value in column.to_pylist()]
    if not replace_invalid_text:
        return cast("list[Any]", column.to_pylist())
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.view(pa.binary() if pa.types.is_string(column.type) else pa.large_binary())
    values: list[Any] = column.to_pylist()
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return [None if value is None else value.decode("utf-8", errors="replace") for value in values]
    return values


def hub_file(repo: str, path: str) -> Path:
    """The local copy of a file of a data set on the hub, downloaded unless the cache has it. HubError where it fails.

    repo: `owner/name`. path: within the data set.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(hf_hub_download(repo, path, repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise HubError(f"{repo}/{path} cannot be had from the hub ({type(error).__name__}: {error})") from None
