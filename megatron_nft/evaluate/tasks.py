"""Benchmarks by name, and question files by path, ready to be asked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_nft.data.benchmarks import BENCHMARKS, BenchmarkError, Question, find_file, read_benchmark, read_prepared
from megatron_nft.data.conflicts import OnConflict
from megatron_nft.data.prompts import encode, render_texts, with_system_prompt
from megatron_nft.evaluate.protocol import Sampling
from megatron_nft.types import Prompt
from megatron_nft.verify.thinking import opens_thinking


@dataclass(frozen=True, slots=True)
class Task:
    """One benchmark of an evaluation."""

    name: str
    title: str
    questions: list[Question]  # Q
    samples: int  # answers per question


def load_tasks(
    names: Sequence[str],
    data: Path | None,
    *,
    samples: int | None,
    limit: int | None,
    conflicts: OnConflict = "refuse",
) -> list[Task]:
    """Load benchmarks and question files (.jsonl or .parquet in verl's layout) in the order of `names`.

    `samples` None takes the paper's number, 1 for files; `limit` keeps the first questions of each; `conflicts` as in
    `read_prepared`. Everything is looked for before anything is asked: BenchmarkError lists all that is unknown.
    """
    unknown = [n for n in names if n not in BENCHMARKS and Path(n).suffix not in (".jsonl", ".parquet")]
    if unknown:
        raise BenchmarkError(
            f"unknown benchmark {', '.join(map(repr, unknown))}; known are {', '.join(BENCHMARKS)}, "
            "or the path of a .jsonl or .parquet file of questions"
        )
    tasks = [_load(name, data, samples, limit, conflicts) for name in names]
    repeated = {t.name for t in tasks if sum(t.name == other.name for other in tasks) > 1}
    if repeated:
        raise BenchmarkError(f"benchmark {', '.join(sorted(repeated))} is named more than once")
    return tasks


def _load(name: str, data: Path | None, samples: int | None, limit: int | None, conflicts: OnConflict) -> Task:
    if name in BENCHMARKS:
        benchmark = BENCHMARKS[name]
        questions = read_benchmark(benchmark, find_file(benchmark, data), conflicts)
        return Task(name, benchmark.title, questions[:limit], samples or benchmark.samples)
    path = Path(name)
    return Task(path.stem, path.name, read_prepared(path, conflicts)[:limit], samples or 1)


def make_prompts(task: Task, tokenizer: Any, system_prompt: str | None) -> list[Prompt]:
    """Return one prompt per question; `Prompt.index` is the question's place in the task.

    DataError, with file and row, where the chat template refuses a question.
    """
    conversations = [with_system_prompt(question.messages, system_prompt) for question in task.questions]
    places = [question.where or f"{task.title}, question {question.id}" for question in task.questions]
    texts = render_texts(tokenizer, conversations, places, "--chat-template or --system-prompt")
    return [
        Prompt(index, q.data_source, messages, q.answer, token_ids, q.extra, opens_thinking(text))
        for index, (q, messages, text, token_ids) in enumerate(
            zip(task.questions, conversations, texts, encode(tokenizer, texts))
        )
    ]


def by_max_tokens(prompts: Sequence[Prompt], sampling: Sampling, max_positions: int) -> dict[int, list[Prompt]]:
    """Group prompts by the number of tokens that their answers may have.

    A prompt over `max_prompt_tokens` is asked whole; its answer gets what is left of max_prompt_tokens +
    max_response_tokens. ValueError where nothing is left, or where the model's positions do not suffice.
    """
    total = sampling.max_prompt_tokens + sampling.max_response_tokens
    groups: dict[int, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        length = len(prompt.token_ids)
        max_tokens = min(sampling.max_response_tokens, total - length)
        if max_tokens < 1:
            raise ValueError(
                f"question {prompt.index} has {length} tokens, which leaves no room for an answer in "
                f"max_prompt_tokens ({sampling.max_prompt_tokens}) + max_response_tokens "
                f"({sampling.max_response_tokens}); raise --max-prompt-tokens"
            )
        if length >= max_positions:
            raise ValueError(
                f"question {prompt.index} alone has {length} tokens, and the model has {max_positions} positions: "
                "no answer has room; leave the question out, or take a model with more positions"
            )
        if length + max_tokens > max_positions:
            raise ValueError(
                f"question {prompt.index} has {length} tokens; with answers of up to {max_tokens} that is more than "
                f"the model's {max_positions} positions; lower --max-response-tokens to {max_positions - length}"
            )
        groups[max_tokens].append(prompt)
    return dict(groups)
