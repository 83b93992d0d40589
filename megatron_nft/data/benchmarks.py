"""The public maths benchmarks: where they are found and how their rows become questions.

A benchmark is read from a local folder (one file per benchmark) or from the Hugging Face hub. Two layouts are known and
told apart by their columns: the benchmark's own (problem, answer, ...) and verl's (prompt, reward_model, ...), whose
messages are used as they stand and whose repeated copies of a question are read once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_nft.data.answer_keys import answer_of_solution, answer_text, ground_truth, solution_text, text_of
from megatron_nft.data.conflicts import Copies, OnConflict
from megatron_nft.data.rows import DataError, read_messages, read_raw, read_rows, shown
from megatron_nft.files import HubError, hub_file

BOXED_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
"""Put under every question that comes without an instruction of its own (Qwen2.5-Math's wording)."""


class BenchmarkError(DataError):
    """A benchmark that is unknown, missing or malformed. The message names file, row and column."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a benchmark."""

    id: str  # stable within its benchmark
    messages: tuple[dict[str, str], ...]  # [{role, content}]
    answer: str  # ground truth
    data_source: str  # graders may look at it
    extra: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)  # file and row, for errors found later


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a data set on the Hugging Face hub."""

    repo: str
    path: str


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A public test set and how the NFT paper uses it."""

    name: str
    title: str
    num_questions: int
    samples: int  # answers per question: avg@samples
    files: tuple[str, ...]  # file names looked for in a folder, without .jsonl or .parquet
    hub: HubFile
    convert: Callable[[dict[str, Any]], tuple[str, Any]]  # row of the benchmark's own layout -> problem, answer


def _problem_answer(row: dict[str, Any]) -> tuple[str, Any]:
    return row["problem"], row["answer"]


def _amc(row: dict[str, Any]) -> tuple[str, Any]:
    answer = row["answer"]  # integers all, which the published file writes as 27.0
    return row["problem"], int(answer) if isinstance(answer, float) and answer.is_integer() else answer


def _gsm8k(row: dict[str, Any]) -> tuple[str, Any]:
    work, mark, answer = solution_text(row["answer"], "answer").rpartition("####")
    if not mark:
        raise ValueError(f"answer {work + answer!r:.60} has no '####' before the result")
    return row["question"], answer.strip().replace(",", "")


def _minerva(row: dict[str, Any]) -> tuple[str, Any]:
    return row["problem"], answer_of_solution(row["solution"])


def _olympiad(row: dict[str, Any]) -> tuple[str, Any]:
    context, question = row.get("context"), text_of(row["question"], "question")
    return f"{context}\n\n{question}" if context else question, row["final_answer"]


_NFT_VALIDATION = "ChenDRAG/VeRL_math_validation"  # the sets that the NFT paper was evaluated on, with their prompts

BENCHMARKS: dict[str, Benchmark] = {
    b.name: b
    for b in (
        Benchmark(
            "aime24", "AIME 2024", 30, 32,
            ("aime24", "aime2024", "aime-2024-boxed_w_answer", "dapo_aime-2024"),
            HubFile(_NFT_VALIDATION, "aime-2024-boxed_w_answer.parquet"), _problem_answer,
        ),
        Benchmark(
            "aime25", "AIME 2025", 30, 32,
            ("aime25", "aime2025", "aime2025_32_dapo_boxed_w_answer"),
            HubFile(_NFT_VALIDATION, "aime2025_32_dapo_boxed_w_answer.parquet"), _problem_answer,
        ),
        Benchmark(
            "amc23", "AMC 2023", 40, 32,
            ("amc23", "amc2023", "amc2023_32_dapo_boxed_w_answer"),
            HubFile(_NFT_VALIDATION, "amc2023_32_dapo_boxed_w_answer.parquet"), _amc,
        ),
        Benchmark(
            "math500", "MATH-500", 500, 1, ("math500", "math500_boxed"),
            HubFile(_NFT_VALIDATION, "math500_boxed.parquet"), _problem_answer,
        ),
        Benchmark(
            "olympiadbench", "OlympiadBench", 675, 1, ("olympiadbench",),
            HubFile(_NFT_VALIDATION, "olympiadbench.parquet"), _olympiad,
        ),
        Benchmark(
            "minerva", "Minerva Math", 272, 1, ("minerva", "minerva_math"),
            HubFile(_NFT_VALIDATION, "minerva_math.parquet"), _minerva,
        ),
        Benchmark(
            "gsm8k", "GSM8K", 1319, 1, ("gsm8k",),
            HubFile("openai/gsm8k", "main/test-00000-of-00001.parquet"), _gsm8k,
        ),
    )
}  # fmt: skip


def find_file(benchmark: Benchmark, folder: Path | None) -> Path:
    """Return the benchmark's file in `folder` or its `eval` subfolder, or download it from the hub where that is None.

    BenchmarkError where it cannot be found.
    """
    if folder is None:
        return _download(benchmark)
    folder = Path(folder)
    if not folder.is_dir():
        raise BenchmarkError(f"data folder {folder} does not exist; give --data, or leave it out to use the hub")
    for place in (folder, folder / "eval"):
        for stem in benchmark.files:
            for suffix in (".parquet", ".jsonl"):
                if (place / (stem + suffix)).is_file():
                    return place / (stem + suffix)
    names = ", ".join(f"{stem}.jsonl" for stem in benchmark.files)
    raise BenchmarkError(
        f"no file for benchmark {benchmark.name} in {folder}: looked for {names} (or .parquet) there and in its eval/"
    )


def read_benchmark(benchmark: Benchmark, path: Path, conflicts: OnConflict = "refuse") -> list[Question]:
    """Read every question of the file, in its order. BenchmarkError or DataError names the row that cannot be used.

    conflicts: what becomes of questions whose copies have different answers, as in `read_prepared`.
    """
    _, first = next(read_raw(path))
    if "prompt" in first:
        return read_prepared(path, conflicts)
    found = [convert_row(benchmark, values, f"{path}, row {number}") for number, values in read_raw(path)]
    return _without_conflicts(found, path, conflicts)


def read_prepared(path: Path, conflicts: OnConflict = "refuse") -> list[Question]:
    """Read the questions of a file in verl's layout, with the prompts as they are; copies of a question are read once.

    Published files carry columns of their own beside prompt and reward_model; they are ignored. A file without
    reward_model is one of our own and is read as strictly as training data. conflicts: what becomes of questions whose
    copies have different answers. With `refuse` they are a DataError with their rows; `drop` leaves such a question
    out; `majority` keeps the copies with the answer of most, and leaves the question out where two answers have most.
    """
    _, first = next(read_raw(path))
    if "reward_model" in first:
        found = [_from_verl(values, str(number), f"{path}, row {number}") for number, values in read_raw(path)]
    else:
        rows = enumerate(read_rows(path), start=1)
        found = [Question(str(n), row.messages, row.answer, row.data_source, row.extra, row.where) for n, row in rows]
    questions: dict[tuple[Any, ...], Question] = {}
    for question in _without_conflicts(found, path, conflicts):
        questions.setdefault(_key(question), question)
    return list(questions.values())


def _key(question: Question) -> tuple[tuple[str, str], ...]:
    return tuple((m["role"], m["content"]) for m in question.messages)


def _without_conflicts(questions: list[Question], path: Path, on_conflict: OnConflict) -> list[Question]:
    """The questions whose copies agree, and of the others the copies with the chosen answer."""
    copies = Copies()
    for question in questions:
        copies.add(_key(question), question.answer, question.where)
    if on_conflict == "refuse":
        copies.refuse("--conflicts drop leaves these questions out, --conflicts majority keeps the usual answer")
    chosen = {key: copies.chosen(key, on_conflict) for key in {_key(question) for question in questions}}
    kept = [question for question in questions if question.answer.strip() == chosen[_key(question)]]
    if not kept:
        raise BenchmarkError(f"{path}: no question is left; the copies of each have different answers")
    return kept


def convert_row(benchmark: Benchmark, values: dict[str, Any], where: str) -> Question:
    """Convert a row in the benchmark's own layout to a question; `where` (file and row) goes into errors."""
    try:
        problem, answer = benchmark.convert(values)
        message = boxed_message(text_of(problem, "problem"))
        number = where.rpartition(" ")[2]
        return Question(_row_id(values, number), (message,), answer_text(answer), benchmark.name, _extra(values), where)
    except KeyError as e:
        raise BenchmarkError(f"{where}: no column {e}; it has {', '.join(values)}") from None
    except ValueError as e:
        raise BenchmarkError(f"{where}: {e}") from None


def boxed_message(problem: str) -> dict[str, str]:
    """Return the problem with the boxed-answer instruction as the user's message."""
    return {"role": "user", "content": f"{problem.strip()}\n{BOXED_INSTRUCTION}"}


def _from_verl(values: dict[str, Any], number: str, where: str) -> Question:
    try:
        messages = _prompt(values.get("prompt"))
        answer = ground_truth(values)
    except ValueError as e:
        raise BenchmarkError(f"{where}: {e}") from None
    extra = values.get("extra_info") or {}
    if not isinstance(extra, dict):
        raise BenchmarkError(f"{where}: column extra_info holds {shown(extra)}, not a mapping")
    index = extra.get("index")
    source = str(values.get("data_source") or "")
    return Question(number if index is None else str(index), messages, answer, source, extra, where)


def _prompt(value: Any) -> tuple[dict[str, str], ...]:
    try:
        return read_messages(value, extra_keys=True)
    except ValueError as error:
        raise ValueError(f"column prompt: {error}") from None


def _row_id(row: dict[str, Any], number: str) -> str:
    for column in ("unique_id", "id", "idx"):
        if row.get(column) is not None:
            return str(row[column])
    return number


def _extra(row: dict[str, Any]) -> dict[str, Any]:
    """What a grader may want to know beside the answer."""
    return {column: row[column] for column in ("unit", "error", "answer_type") if row.get(column) is not None}


def _download(benchmark: Benchmark) -> Path:
    try:
        return hub_file(benchmark.hub.repo, benchmark.hub.path)
    except HubError as error:
        raise BenchmarkError(
            f"benchmark {benchmark.name}: {error}; download it elsewhere and name its folder with --data"
        ) from None
