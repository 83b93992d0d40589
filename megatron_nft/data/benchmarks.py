"""The public maths benchmarks: where they are found and how their rows become questions.

A benchmark is read from a local folder (one file per benchmark) or from the Hugging Face hub. Two layouts are known and
told apart by their columns: the benchmark's own (problem, answer, ...) and verl's (prompt, reward_model, ...), whose
messages are used as they stand and whose repeated copies of a question are read once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_nft.data.rows import DataError, read_messages, read_raw, read_rows
from megatron_nft.files import HubError, JsonFloat, hub_file
from megatron_nft.verify.boxed import last_box, last_boxes

BOXED_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
"""Put under every question that comes without an instruction of its own (Qwen2.5-Math's wording)."""

EXACT_FLOATS = 2.0**53  # below it a whole number of a parquet file is known to its last digit


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


def _gsm8k(row: dict[str, Any]) -> tuple[str, Any]:
    work, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise ValueError(f"answer {work + answer!r:.60} has no '####' before the result")
    return row["question"], answer.strip().replace(",", "")


def _minerva(row: dict[str, Any]) -> tuple[str, Any]:
    return row["problem"], answer_of_solution(row["solution"])


def _olympiad(row: dict[str, Any]) -> tuple[str, Any]:
    context = row.get("context")
    return f"{context}\n\n{row['question']}" if context else row["question"], row["final_answer"]


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
            HubFile(_NFT_VALIDATION, "amc2023_32_dapo_boxed_w_answer.parquet"), _problem_answer,
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


def read_benchmark(benchmark: Benchmark, path: Path) -> list[Question]:
    """Read every question of the file, in its order. BenchmarkError or DataError names the row that cannot be used."""
    _, first = next(read_raw(path))
    if "prompt" in first:
        return read_prepared(path)
    return [convert_row(benchmark, values, f"{path}, row {number}") for number, values in read_raw(path)]


def read_prepared(path: Path) -> list[Question]:
    """Read the questions of a file in verl's layout, with the prompts as they are; copies of a question are read once.

    Published files carry columns of their own beside prompt and reward_model; they are ignored. A file without
    reward_model is one of our own and is read as strictly as training data.
    """
    _, first = next(read_raw(path))
    if "reward_model" in first:
        found = [_from_verl(values, str(number), f"{path}, row {number}") for number, values in read_raw(path)]
    else:
        rows = enumerate(read_rows(path), start=1)
        found = [Question(str(n), row.messages, row.answer, row.data_source, row.extra, row.where) for n, row in rows]
    questions: dict[tuple[Any, ...], Question] = {}
    for question in found:
        key = (*((m["role"], m["content"]) for m in question.messages), question.answer)
        questions.setdefault(key, question)
    return list(questions.values())


def convert_row(benchmark: Benchmark, values: dict[str, Any], where: str) -> Question:
    """Convert a row in the benchmark's own layout to a question; `where` (file and row) goes into errors."""
    try:
        problem, answer = benchmark.convert(values)
        message = boxed_message(_text(problem, "problem"))
        number = where.rpartition(" ")[2]
        return Question(_row_id(values, number), (message,), answer_text(answer), benchmark.name, _extra(values), where)
    except KeyError as e:
        raise BenchmarkError(f"{where}: no column {e}; it has {', '.join(values)}") from None
    except (TypeError, AttributeError, ValueError) as e:
        raise BenchmarkError(f"{where}: {e}") from None


def boxed_message(problem: str) -> dict[str, str]:
    """Return the problem with the boxed-answer instruction as the user's message."""
    return {"role": "user", "content": f"{problem.strip()}\n{BOXED_INSTRUCTION}"}


class MissingAnswerError(DataError):
    """An answer column that holds null, NaN or an infinity. The message lacks file and row."""


def answer_text(value: Any) -> str:
    """Return the ground truth as text: 27.0 -> '27', ['2', '3'] -> '2, 3'.

    A number of a JSON file keeps its digits: 6.02e23 -> '6.02e23', 2.50 -> '2.50'. MissingAnswerError for null, NaN and
    infinities, ValueError for booleans, mappings and empty texts.
    """
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return _number_text(value)
    if value is None:
        raise MissingAnswerError("the answer is None (null); there is nothing that a response could match")
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        return ", ".join(answer_text(v) for v in value)
    raise ValueError(f"the answer is {value!r} ({type(value).__name__}); a text, a number or a list of them is needed")


def _number_text(value: int | float) -> str:
    if isinstance(value, int):
        return str(value)
    if isinstance(value, JsonFloat):
        whole, point, zeros = value.text.partition(".")
        return whole if point and not zeros.strip("0") else value.text
    if not math.isfinite(value):
        raise MissingAnswerError(f"the answer is {value} (a number); there is nothing that a response could match")
    return str(int(value)) if value.is_integer() and abs(value) < EXACT_FLOATS else repr(value)


def answer_of_solution(solution: str) -> str:
    r"""Return what the last complete `\boxed{}` of a solution holds, together with the other boxes of its sentence.

    ValueError if there is none.
    """
    answer = last_boxes(solution)
    if answer is not None and "%" not in (last_box(solution) or ""):
        answer = answer.removesuffix("\\%")  # stands behind the box, not in it
    if answer is None:
        raise ValueError(f"no complete \\boxed{{}} in {solution[-60:]!r}")
    return answer.strip()


def _from_verl(values: dict[str, Any], number: str, where: str) -> Question:
    try:
        messages = _prompt(values["prompt"])
        answer = answer_text(values["reward_model"]["ground_truth"])
    except KeyError as e:
        raise BenchmarkError(f"{where}: no {e} in prompt or reward_model, as verl's layout has it") from None
    except (TypeError, ValueError) as e:
        raise BenchmarkError(f"{where}: {e}") from None
    extra = values.get("extra_info") or {}
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


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"column {column} holds {value!r} ({type(value).__name__}), not a text")
    return value


def _download(benchmark: Benchmark) -> Path:
    try:
        return hub_file(benchmark.hub.repo, benchmark.hub.path)
    except HubError as error:
        raise BenchmarkError(
            f"benchmark {benchmark.name}: {error}; download it elsewhere and name its folder with --data"
        ) from None
