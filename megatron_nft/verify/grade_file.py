"""Grade all responses in a file.

Results go to a journal beside the output, row by row and in order; at the end the output is written from it in one
step. After an interruption the same call continues where the journal ends, unless the input or the graders have
changed.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console

from megatron_nft.console import show_progress
from megatron_nft.files import LongInteger, RowsError, sha256_of_file
from megatron_nft.types import Verdict
from megatron_nft.verify.grade_report import Tally, disagree
from megatron_nft.verify.grade_rows import as_text, opens_thinking_in, response_column, rows_to_grade, write_rows
from megatron_nft.verify.graders import RULES, split_names
from megatron_nft.verify.outcome import Graded
from megatron_nft.verify.pool import VerifierPool

if TYPE_CHECKING:
    from megatron_nft.config import VerifyConfig

IN_FLIGHT_ROWS = 1024
FLUSH_EVERY_S = 0.5


def grade_file(source: Path, target: Path, config: VerifyConfig, console: Console) -> Tally:
    """Grade all rows of `source` (JSONL or parquet) and write them with their verdicts to `target`.

    Returns the counts of verdicts. Raises RowsError for a file that cannot be read or written, GraderError for an
    unknown grader, VerifierError if a grader cannot be loaded.
    """
    names = split_names(config.grader)
    _check_paths(source, target)
    num_rows, checksum = _scan(source)
    limits = {"timeout_s": config.timeout_s, "memory_bytes": config.memory_bytes}
    key = {"input": checksum, "graders": names, "rules": RULES, **limits}
    journal = target.with_name(f"{target.name}.journal")
    done = _open_journal(journal, key)
    if done:
        console.print(f"going on after row {done} of {num_rows}", markup=False)
    with show_progress("grading", num_rows, done=done) as progress, journal.open("a", encoding="utf-8") as file:
        for _ in _grade(source, done, config, names, file):
            progress.advance()
    tally = Tally(names)
    write_rows(target, source, _results(source, journal, tally))
    journal.unlink()
    return tally


def _check_paths(source: Path, target: Path) -> None:
    if target.suffix not in (".jsonl", ".json", ".parquet"):
        raise RowsError(f"{target}: the output ends in .jsonl or .parquet, not in {target.suffix or 'nothing'!r}")
    if target.exists() and source.exists() and target.samefile(source):
        raise RowsError(f"{target}: input and output are the same file")
    if target.is_dir() or not target.parent.is_dir():
        raise RowsError(f"{target}: cannot be written: {target.parent} is not a folder, or the output is one")


def _scan(path: Path) -> tuple[int, str]:
    """Return the number of rows and the SHA-256 of the file. Raises RowsError for a row that cannot be read."""
    count = 0
    for row in rows_to_grade(path):
        if count == 0:
            response_column(row, path)
        count += 1
    return count, sha256_of_file(path)


def _open_journal(path: Path, key: dict[str, Any]) -> int:
    """Return how many rows an earlier, interrupted call has graded; an incomplete last line is cut off the journal.

    key: what the journal is valid for. A journal of anything else is begun anew.
    """
    key = json.loads(json.dumps(key))
    with contextlib.suppress(FileNotFoundError), path.open("rb+") as file:
        header = file.readline()
        with contextlib.suppress(ValueError):
            if json.loads(header) == key:
                rows, end = 0, file.tell()
                for line in file:
                    if not line.endswith(b"\n"):  # cut off in the middle
                        break
                    rows += 1
                    end += len(line)
                file.truncate(end)
                return rows
    path.write_text(json.dumps(key) + "\n", encoding="utf-8")
    return 0


def _grade(path: Path, done: int, config: VerifyConfig, names: tuple[str, ...], journal: TextIO) -> Iterator[None]:
    """Grade the rows after the first `done` into the journal. Yields after each row."""
    waiting: deque[Future[Graded] | str] = deque()
    flushed = time.monotonic()
    with VerifierPool(config) as pool:
        for submitted in _submissions(path, done, pool):
            waiting.append(submitted)
            while waiting and (len(waiting) >= IN_FLIGHT_ROWS or isinstance(waiting[0], str) or waiting[0].done()):
                journal.write(_journal_line(waiting.popleft(), names))
                yield
            if time.monotonic() - flushed > FLUSH_EVERY_S:
                journal.flush()
                flushed = time.monotonic()
        while waiting:
            journal.write(_journal_line(waiting.popleft(), names))
            journal.flush()
            yield


def _submissions(path: Path, done: int, pool: VerifierPool) -> Iterator[Future[Graded] | str]:
    """Yield for each row its future, or the reason why it cannot be graded."""
    column = None
    for number, row in enumerate(rows_to_grade(path)):
        column = column or response_column(row, path)
        if number < done:
            continue
        response, answer = row.get(column), as_text(row.get("answer"))
        if not isinstance(response, str) or isinstance(response, LongInteger):
            yield f"the response is {_kind(response)}, not text"
        elif answer is None or not answer.strip():
            yield f"the reference answer is {'empty' if answer is not None else _kind(row.get('answer'))}"
        else:
            extra = row.get("extra_info")
            source = row.get("data_source")
            yield pool.submit(
                response,
                answer,
                source if isinstance(source, str) else "",
                extra if isinstance(extra, dict) else None,
                prompt_opens_thinking=opens_thinking_in(row),
            )


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    number = isinstance(value, (int, float, LongInteger)) and not isinstance(value, bool)
    return "a number" if number else f"a {type(value).__name__}"


def _journal_line(result: Future[Graded] | str, names: tuple[str, ...]) -> str:
    """Return a result as a line of JSON, with the keys of the output. names: the graders, for a row without verdict."""
    values: dict[str, Any]
    if isinstance(result, str):
        values = {
            "verdict": Verdict.UNPARSEABLE,
            "extracted": None,
            "grader": names[0],
            "seconds": 0.0,
            "reason": result,
            "grader_verdicts": dict.fromkeys(names, Verdict.UNPARSEABLE),
        }
    else:
        graded = result.result()
        values = {
            "verdict": graded.verdict,
            "extracted": graded.extracted,
            "grader": graded.grader,
            "seconds": round(graded.seconds, 6),
            "reason": graded.reason,
            "grader_verdicts": graded.by_grader,
        }
    return json.dumps(values) + "\n"


def _results(path: Path, journal: Path, tally: Tally) -> Iterator[dict[str, Any]]:
    """Yield the columns that each row gets, and count them in `tally`."""
    with journal.open(encoding="utf-8") as file:
        next(file)  # the header
        for number, (row, line) in enumerate(zip(rows_to_grade(path), file, strict=True), start=1):
            result = json.loads(line)
            tally.add(number, result, row.get("answer"))
            by_grader = result.pop("grader_verdicts")
            if len(tally.graders) > 1:
                result["grader_verdicts"] = json.dumps(by_grader)
                result["graders_disagree"] = disagree(by_grader)
            yield result
