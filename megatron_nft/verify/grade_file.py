"""`megatron-nft grade`: verdicts for the responses in a file.

Results go to a journal beside the output, row by row and in order; the output is written from it at the end, at once.
The same command after an interruption goes on where the journal ends, unless the input or the graders have changed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from megatron_nft.console import show_progress
from megatron_nft.files import RowsError, sha256_of_file
from megatron_nft.types import Verdict
from megatron_nft.verify.grade_report import Tally, disagree, print_report
from megatron_nft.verify.grade_rows import as_text, response_column, rows_to_grade, write_rows
from megatron_nft.verify.graders import GRADERS, GraderError, split_names
from megatron_nft.verify.inbox import VerifierError
from megatron_nft.verify.outcome import Graded
from megatron_nft.verify.pool import VerifierPool

IN_FLIGHT_ROWS = 1024
FLUSH_EVERY_S = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--input", type=Path, required=True, help="JSONL or parquet with response (or text) and answer")
    parser.add_argument("--output", type=Path, required=True, help="JSONL or parquet; an existing file is replaced")
    parser.add_argument(
        "--grader",
        default="math_verify",
        help=f"one or several, comma-separated: {', '.join(GRADERS)}, numeric:TOLERANCE, or module.function "
        "(default: math_verify); the verdict is the first one's",
    )
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--workers", type=_positive(int), default=cpus, help="processes (default: one per CPU)")
    parser.add_argument("--timeout-s", type=_positive(float), default=3.0, help="time for one verdict (default: 3)")
    memory_help = "memory that grading one row may take (default: 1 GiB)"
    parser.add_argument("--memory-bytes", type=_positive(int), default=1 << 30, help=memory_help)


def _positive(kind: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    read.__name__ = kind.__name__  # argparse names it in its messages
    return read


def run(args: argparse.Namespace) -> int:
    """Grade the file. 0: every row has its verdict; 1: it could not be done; 2: no such grader; 130: interrupted."""
    console = Console(soft_wrap=False, highlight=False)
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        tally = grade_file(args, console)
    except (RowsError, GraderError, VerifierError, OSError) as error:
        errors.print(f"grade: {error}", markup=False, style="red")
        return 2 if isinstance(error, GraderError) else 1
    except KeyboardInterrupt:
        errors.print("grade: interrupted; the same command goes on from here", markup=False)
        return 130
    print_report(console, tally)
    console.print(f"written: {args.output}", markup=False)
    return 0


def grade_file(args: argparse.Namespace, console: Console) -> Tally:
    """Grade all rows of `args.input` into `args.output`; the counts."""
    from megatron_nft.config import VerifyConfig

    names = split_names(args.grader)
    config = VerifyConfig(
        grader=args.grader, workers=args.workers, timeout_s=args.timeout_s, memory_bytes=args.memory_bytes
    )
    _check_paths(args.input, args.output)
    num_rows, checksum = _scan(args.input)
    key = {"input": checksum, "graders": names, "timeout_s": args.timeout_s, "memory_bytes": args.memory_bytes}
    journal = args.output.with_name(f"{args.output.name}.journal")
    done = _open_journal(journal, key)
    if done:
        console.print(f"going on after row {done} of {num_rows}", markup=False)
    with show_progress("grading", num_rows, done=done) as progress, journal.open("a", encoding="utf-8") as file:
        for _ in _grade(args.input, done, config, file):
            progress.advance()
    tally = Tally(names)
    write_rows(args.output, args.input, _results(args.input, journal, tally))
    journal.unlink()
    return tally


def _check_paths(source: Path, target: Path) -> None:
    if target.suffix not in (".jsonl", ".json", ".parquet"):
        raise RowsError(f"{target}: the output ends in .jsonl or .parquet, not in {target.suffix or 'nothing'!r}")
    if target.exists() and source.exists() and target.samefile(source):
        raise RowsError(f"{target}: input and output are the same file")
    if target.is_dir() or not target.parent.is_dir():
        raise RowsError(f"{target}: cannot be written: {target.parent} is no folder, or the output is one")


def _scan(path: Path) -> tuple[int, str]:
    """The number of rows, each of which can be read, and a checksum of the file."""
    count = 0
    for row in rows_to_grade(path):
        if count == 0:
            response_column(row, path)
        count += 1
    return count, sha256_of_file(path)


def _open_journal(path: Path, key: dict[str, Any]) -> int:
    """The number of rows that an earlier, interrupted command has graded; the journal then ends after them."""
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


def _grade(path: Path, done: int, config: Any, journal: TextIO) -> Iterator[int]:
    """Grade the rows after the first `done` into the journal; yields 1 for each."""
    waiting: deque[Future[Graded] | str] = deque()
    flushed = time.monotonic()
    with VerifierPool(config) as pool:
        for submitted in _submissions(path, done, pool):
            waiting.append(submitted)
            while waiting and (len(waiting) >= IN_FLIGHT_ROWS or isinstance(waiting[0], str) or waiting[0].done()):
                journal.write(_journal_line(waiting.popleft(), config.grader))
                yield 1
            if time.monotonic() - flushed > FLUSH_EVERY_S:
                journal.flush()
                flushed = time.monotonic()
        while waiting:
            journal.write(_journal_line(waiting.popleft(), config.grader))
            journal.flush()
            yield 1


def _submissions(path: Path, done: int, pool: VerifierPool) -> Iterator[Future[Graded] | str]:
    """Per row its future, or the reason why it cannot be graded."""
    column = None
    for number, row in enumerate(rows_to_grade(path)):
        column = column or response_column(row, path)
        if number < done:
            continue
        response, answer = row.get(column), as_text(row.get("answer"))
        if not isinstance(response, str):
            yield f"the response is {'null' if response is None else type(response).__name__}, not text"
        elif answer is None or not answer.strip():
            yield f"the reference answer is {'empty' if answer is not None else _kind(row.get('answer'))}"
        else:
            extra = row.get("extra_info")
            source = row.get("data_source")
            yield pool.submit(
                response, answer, source if isinstance(source, str) else "", extra if isinstance(extra, dict) else None
            )


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _journal_line(result: Future[Graded] | str, graders: str) -> str:
    """One result as a line of JSON, keys as in the output."""
    if isinstance(result, str):
        names = split_names(graders)
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
    """The columns that each row gets; counts them in `tally` on the way."""
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


def main(argv: list[str] | None = None) -> int:
    """The command by itself: python -m megatron_nft.verify.grade_file."""
    parser = argparse.ArgumentParser(prog="megatron-nft grade", description=__doc__.splitlines()[0])
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
