"""One evaluation, from its settings to its result files. Answers that are in the folder already are not asked again.

out/protocol.json             what is asked, how, of what
out/answers/<benchmark>.jsonl every answer
out/results.json, results.md, results.html
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_nft.console import Progress, show_progress
from megatron_nft.data.rollout_file import prompt_text
from megatron_nft.evaluate.benchmark_metrics import benchmark_metrics, macro_average, question_scores
from megatron_nft.evaluate.page import evaluation_page
from megatron_nft.evaluate.protocol import FORMAT, Sampling, differences
from megatron_nft.evaluate.questions import QuestionResult, evaluate_questions
from megatron_nft.evaluate.records import AnswerFile
from megatron_nft.evaluate.summary import to_markdown
from megatron_nft.evaluate.tasks import Task, by_max_tokens
from megatron_nft.files import write_atomically
from megatron_nft.locks import FolderInUseError, hold_folder
from megatron_nft.types import Prompt


class EvaluationError(ValueError):
    """An evaluation that cannot start or go on. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The engine that is asked and the verifier that grades; opened only if something is left to ask."""

    engine: Any  # engines.engine.Engine
    verifier: Any  # verify.VerifierPool
    stop_token_ids: tuple[int, ...] = ()  # the tokens that end an answer


def answer_path(out: Path, task_name: str) -> Path:
    """Return the file that keeps the answers to a benchmark."""
    return Path(out) / "answers" / f"{task_name}.jsonl"


@contextmanager
def claim_folder(out: Path, protocol: Mapping[str, Any]) -> Iterator[None]:
    """Hold `out` for this run alone, with its protocol written. EvaluationError where another evaluation has it."""
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = hold_folder(out)
    except FolderInUseError:
        raise EvaluationError(f"another evaluation is writing to {out}; choose another --out") from None
    except OSError as e:
        raise EvaluationError(f"--out {out} cannot be written: {e.strerror or e}") from None
    with held:
        path = out / "protocol.json"
        if path.exists():
            _check_same(out, read_json(path), protocol)
        else:
            write_atomically(path, json.dumps(protocol, indent=2, ensure_ascii=False) + "\n")
        yield


def _check_same(out: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    if old.get("format") != FORMAT:
        raise EvaluationError(
            f"{out} holds an evaluation of format {old.get('format')!r}, this version writes {FORMAT}; "
            "choose another --out"
        )
    if old["run_hash"] != new["run_hash"]:
        raise EvaluationError(
            f"{out} holds an evaluation with other settings; choose another --out, or give the same settings to go on "
            "with it:\n  " + "\n  ".join(differences(old, new, with_model=True))
        )


def run_tasks(
    tasks: Sequence[Task],
    prompts: Mapping[str, Sequence[Prompt]],
    sampling: Sampling,
    max_positions: int,
    tokenizer: Any,
    out: Path,
    open_parts: Callable[[], AbstractContextManager[Parts]],
) -> dict[str, list[QuestionResult]]:
    """Return all answers by benchmark. What is missing is asked, and each question is written as it finishes."""
    files = {t.name: AnswerFile(answer_path(out, t.name), len(t.questions), t.samples) for t in tasks}
    total = sum(len(t.questions) * t.samples for t in tasks)
    done = sum(len(files[t.name].done) * t.samples for t in tasks)
    if done < total:
        with open_parts() as parts, show_progress("answers", total, done=done) as progress:
            for task in tasks:
                _ask(task, prompts[task.name], files[task.name], sampling, max_positions, tokenizer, parts, progress)
    return {name: file.results() for name, file in files.items()}


def _ask(
    task: Task,
    prompts: Sequence[Prompt],
    file: AnswerFile,
    sampling: Sampling,
    max_positions: int,
    tokenizer: Any,
    parts: Parts,
    progress: Progress,
) -> None:
    """Ask the questions that the file lacks."""
    missing = [p for p in prompts if p.index not in file.done]

    def keep(result: QuestionResult) -> None:
        prompt = prompts[result.index]
        file.append(result, id=task.questions[result.index].id, prompt=prompt_text(prompt), answer=prompt.answer)

    with file:
        for max_tokens, group in by_max_tokens(missing, sampling, max_positions).items():
            evaluate_questions(
                parts.engine,
                group,
                tokenizer,
                parts.verifier,
                samples=task.samples,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=max_tokens,
                seed=sampling.seed,
                stop_token_ids=parts.stop_token_ids,
                on_answer=lambda _: progress.advance(),
                on_question=keep,
            )


def make_results(
    tasks: Sequence[Task],
    prompts: Mapping[str, Sequence[Prompt]],
    answers: Mapping[str, Sequence[QuestionResult]],
    protocol: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the content of results.json."""
    benchmarks = {}
    for task in tasks:
        limit = protocol["sampling"]["max_prompt_tokens"]
        over_long = sum(len(p.token_ids) > limit for p in prompts[task.name])
        benchmarks[task.name] = {**benchmark_metrics(answers[task.name]), "over_long_prompts": over_long}
    scores = {task.name: question_scores(answers[task.name]) for task in tasks}
    return {
        "format": FORMAT,
        "benchmarks": benchmarks,
        "average": asdict(macro_average(scores)) if len(tasks) > 1 else None,
        "protocol": dict(protocol),
    }


def write_results(out: Path, results: Mapping[str, Any]) -> None:
    """Write results.json, results.md and results.html."""
    write_atomically(out / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    write_atomically(out / "results.md", to_markdown(results))
    evaluation_page(out, results, out / "results.html")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. EvaluationError where the file is absent or holds anything else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise EvaluationError(f"{path}: {e.strerror or e}") from None
    except ValueError as e:
        raise EvaluationError(f"{path} is damaged: {e}") from None
    if not isinstance(value, dict):
        raise EvaluationError(f"{path} holds a {type(value).__name__}, not an object")
    return value
