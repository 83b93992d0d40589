"""Bringing public question sets into this project's layout (data/rows.py): what `megatron-nft prepare` does.

A source row is either of the set's own columns (problem, answer, …) or already in the verl layout. Its problem gets the
boxed-answer instruction; DAPO's "Answer:" instruction is taken off first. Rows without a usable answer are dropped and
counted, never guessed. An answer that is null, NaN or infinite, and copies of a question with different answers, are
faults of the source and refused unless told otherwise.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_nft.data.answer_keys import (
    MissingAnswerError,
    answer_of_solution,
    answer_text,
    ground_truth,
    text_of,
)
from megatron_nft.data.benchmarks import (
    BENCHMARKS,
    BOXED_INSTRUCTION,
    HubFile,
)
from megatron_nft.data.conflicts import Copies, OnConflict
from megatron_nft.data.rows import DataError, read_messages, read_raw
from megatron_nft.files import HubError, hub_file, replacing, write_atomically

_DAPO_PROMPT = re.compile(
    r"\ASolve the following math problem step by step\. The last line of your response should be of the form "
    r"Answer: \$Answer \(without quotes\) where \$Answer is the answer to the problem\.\s*(?P<problem>.*?)\s*"
    r'Remember to put your answer on its own line after "Answer:"\.\s*\Z',
    re.DOTALL,
)
_BOXED = "\\boxed{}"


@dataclass(frozen=True, slots=True)
class SourceSet:
    """A public set: where the hub has it, and how a row of its own layout becomes problem and answer."""

    title: str
    hub: HubFile
    convert: Callable[[dict[str, Any]], tuple[str, Any]]


def _math(row: dict[str, Any]) -> tuple[str, Any]:
    return row["problem"], row["answer"] if "answer" in row else answer_of_solution(row["solution"])


def _verl_only(row: dict[str, Any]) -> tuple[str, Any]:
    raise DataError(f"is not in the verl layout (prompt, reward_model); columns found: {', '.join(row)}")


SETS: dict[str, SourceSet] = {
    "gsm8k_train": SourceSet(
        "GSM8K, training",
        HubFile("openai/gsm8k", "main/train-00000-of-00001.parquet"),
        BENCHMARKS["gsm8k"].convert,
    ),
    "math_train": SourceSet(
        "MATH, training",
        HubFile("DigitalLearningGmbH/MATH-lighteval", "data/train-00000-of-00001.parquet"),
        _math,
    ),
    "dapo_math_17k": SourceSet(
        "DAPO-Math-17k", HubFile("BytedTsinghua-SIA/DAPO-Math-17k", "data/dapo-math-17k.parquet"), _verl_only
    ),
    "nft_dapo_math_17k": SourceSet(
        "DAPO-Math-17k with the NFT paper's prompts",
        HubFile("ChenDRAG/VeRL_math_validation", "dapo-math-17k_10boxed.parquet"),
        _verl_only,
    ),
} | {name: SourceSet(b.title, b.hub, b.convert) for name, b in BENCHMARKS.items()}


@dataclass(slots=True)
class PreparationSummary:
    """What became of the rows of a source."""

    read: int = 0
    duplicates: int = 0
    written: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> rows
    first_dropped: dict[str, int] = field(default_factory=dict)  # reason -> row number of the first
    conflicts: int = 0  # questions of which copies have different answers
    conflict_rows: int = 0  # rows of such questions that were left out


def prepare(
    name: str,
    rows: Iterable[tuple[int, dict[str, Any]]],
    where: str,
    *,
    instruction: str = BOXED_INSTRUCTION,
    copies: int = 1,
    limit: int | None = None,
    conflicts: OnConflict = "refuse",
    missing: Literal["refuse", "drop"] = "refuse",
) -> tuple[list[dict[str, Any]], PreparationSummary]:
    """Return (rows in our layout, what became of the source's rows). DataError if none is usable.

    copies: how often each question stands in the result. limit: different questions after which reading stops. where:
    names the source in errors. conflicts: what becomes of questions whose copies have different answers; `majority`
    keeps the answer of most copies and leaves the question out where two answers have the most. missing: what becomes
    of rows whose answer is null, NaN or infinite.
    """
    source, summary = SETS[name], PreparationSummary()
    first: dict[tuple[str, str], tuple[list[dict[str, str]], str, dict[str, Any]]] = {}  # by question and answer
    found = Copies()
    for number, raw in rows:
        summary.read += 1
        try:
            messages, answer, data_source = _question(raw, source, name, instruction)
        except KeyError as e:
            raise DataError(f"{where}, row {number}: no column {e}; columns found: {', '.join(raw)}") from None
        except DataError as e:
            if missing == "refuse" or not isinstance(e, MissingAnswerError):
                hint = "; --missing drop leaves such rows out" if isinstance(e, MissingAnswerError) else ""
                raise DataError(f"{where}, row {number}: {e}{hint}") from None
            _drop(summary, str(e), number)
            continue
        except ValueError as e:
            _drop(summary, str(e), number)
            continue
        key = json.dumps(messages)
        if found.add(key, answer, f"row {number}"):
            first[key, answer] = (messages, data_source, raw)
        if len(found) == limit:
            break
    if conflicts == "refuse":
        try:
            found.refuse("--conflicts drop leaves these questions out, --conflicts majority keeps the usual answer")
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
    out = _chosen_rows(found, first, conflicts, summary)
    if not out:
        raise DataError(f"{where}: none of the {summary.read} rows can be used as {name}; {_main_reason(summary)}")
    out = [row for row in out for _ in range(copies)]
    summary.written = len(out)
    return out, summary


def _chosen_rows(
    found: Copies,
    first: dict[tuple[str, str], tuple[list[dict[str, str]], str, dict[str, Any]]],
    conflicts: OnConflict,
    summary: PreparationSummary,
) -> list[dict[str, Any]]:
    """One row per question, in the order in which the source has them; fills in the summary's counts."""
    out: list[dict[str, Any]] = []
    summary.conflicts = len(found.conflicts())
    for key in dict.fromkeys(key for key, _ in first):
        counts, answer = found.counts(key), found.chosen(key, conflicts)
        if answer is None:
            summary.conflict_rows += sum(counts.values())
            continue
        summary.conflict_rows += sum(counts.values()) - counts[answer]
        summary.duplicates += counts[answer] - 1
        messages, data_source, raw = first[key, answer]
        out.append(_row(len(out), messages, answer, data_source, raw))
    return out


def _drop(summary: PreparationSummary, reason: str, number: int) -> None:
    summary.dropped[reason] += 1
    summary.first_dropped.setdefault(reason, number)


def _main_reason(summary: PreparationSummary) -> str:
    if not summary.dropped:
        return "their copies have different answers"
    reason, count = summary.dropped.most_common(1)[0]
    return f"{count} of them (first: row {summary.first_dropped[reason]}): {reason}"


def _question(
    raw: dict[str, Any], source: SourceSet, name: str, instruction: str
) -> tuple[list[dict[str, str]], str, str]:
    """(messages, answer, data_source) of a source row."""
    if "prompt" in raw and "reward_model" in raw:
        try:
            messages = [dict(message) for message in read_messages(raw["prompt"], extra_keys=True)]
        except ValueError as error:
            raise ValueError(f"the prompt cannot be used: {error}") from None
        content = messages[-1]["content"]
        if _BOXED not in content:  # a prompt that asks for a box already keeps its own words
            match = _DAPO_PROMPT.match(content)
            messages[-1]["content"] = _instructed(match["problem"] if match else content, instruction)
        return messages, ground_truth(raw), raw.get("data_source") or name
    problem, answer = source.convert(raw)
    return [{"role": "user", "content": _instructed(problem, instruction)}], answer_text(answer), name


def _instructed(problem: str, instruction: str) -> str:
    text_of(problem, "problem")
    return f"{problem.strip()}\n{instruction}" if instruction else problem.strip()


def _row(
    index: int, messages: list[dict[str, str]], answer: str, data_source: str, raw: dict[str, Any]
) -> dict[str, Any]:
    extra = raw.get("extra_info")
    known = extra if isinstance(extra, dict) else {}
    source_id = next((str(v) for v in (raw.get("unique_id"), raw.get("id"), known.get("index")) if v is not None), None)
    return {
        "data_source": data_source,
        "prompt": messages,
        "ability": raw.get("ability") or "MATH",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"index": index, "source_id": source_id},
    }


def open_source(
    source: str | None, name: str, split: str, subset: str | None
) -> tuple[Iterator[tuple[int, dict[str, Any]]], str]:
    """Return (rows, their source's name for messages).

    source: a local file, `owner/name/file` or `owner/name` on the hub; None for the place of the set itself. DataError
    where it cannot be read.
    """
    if source is None:
        hub = SETS[name].hub
        return read_raw(_download(hub.repo, hub.path)), f"{hub.repo}/{hub.path}"
    path = Path(source)
    if path.suffix in (".parquet", ".jsonl", ".json"):
        parts = source.split("/", 2)
        if not path.exists() and len(parts) == 3 and not source.startswith((".", "/", "~")):
            return read_raw(_download(f"{parts[0]}/{parts[1]}", parts[2])), source
        return read_raw(path), source
    if path.exists() or source.count("/") != 1:
        raise DataError(f"{source}: neither a .parquet or .jsonl file nor a data set's name on the hub (owner/name)")
    return _load_dataset(source, split, subset), f"{source}, split {split}"


def _download(repo: str, path: str) -> Path:
    try:
        return hub_file(repo, path)
    except HubError as error:
        raise DataError(f"{error}; download it elsewhere and give the file's path") from None


def _load_dataset(repo: str, split: str, subset: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    import datasets

    try:
        return enumerate(datasets.load_dataset(repo, subset, split=split), start=1)
    except Exception as e:  # the library's errors share no base class
        raise DataError(f"{repo}, split {split}: {type(e).__name__}: {e}") from e


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Write all rows as .parquet or .jsonl, whole or not at all. DataError for another ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        with replacing(path) as file:
            pq.write_table(pa.Table.from_pylist(rows), file)
    elif path.suffix == ".jsonl":
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    else:
        raise DataError(f"{path}: the output ends in .parquet or .jsonl")
