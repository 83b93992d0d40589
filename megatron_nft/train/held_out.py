"""The held-out questions of a training run: one benchmark per file, copies of a question counted as one."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_nft.config import Config
from megatron_nft.data.prompts import PromptStream
from megatron_nft.distributed import gather_objects
from megatron_nft.engines.engine import Engine, SamplingParams
from megatron_nft.evaluate.benchmark_metrics import macro_average
from megatron_nft.evaluate.intervals import score_interval
from megatron_nft.evaluate.questions import evaluate_questions, merge_counts, summarize_counts
from megatron_nft.train.lifecycle import Interrupted, Lifecycle
from megatron_nft.train.rounds import Rounds
from megatron_nft.types import Prompt
from megatron_nft.verify import VerifierPool


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Q questions, the same on every rank."""

    prompts: list[Prompt]  # Q; the seeds of the answers hang on Prompt.index
    benchmarks: list[str]  # Q, name of the file that a question stands in


def load_held_out(paths: Sequence[Path], tokenizer: Any, **options: Any) -> HeldOut:
    """Every question of the files, in their order. `options` as for PromptStream. DataError for what it refuses."""
    found = HeldOut([], [])
    rows = 0
    for path in paths:
        stream = PromptStream([path], tokenizer, shuffle=False, **options)
        prompts = [prompt for _, prompt in stream.draw(stream.num_prompts)]
        found.prompts.extend(replace(prompt, index=rows + prompt.index) for prompt in prompts)
        found.benchmarks.extend([Path(path).stem] * len(prompts))
        rows += stream.num_prompts + stream.num_dropped
    return found


class World(Protocol):
    """The part of `policy.parallel.ParallelLayout` that is used here."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def world_gloo(self) -> dist.ProcessGroup: ...


def evaluate_held_out(
    held_out: HeldOut,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    verifier: VerifierPool,
    config: Config,
    world: World,
    life: Lifecycle,
    stop_token_ids: Sequence[int] = (),
    rounds: Rounds | None = None,
) -> dict[str, float]:
    """Held-out accuracy under names `eval/…`, each rank asking its share; the same on every rank. Collective.

    Interrupted, on every rank, where a stop signal came before all had their answers. rounds: those of this
    evaluation, where ranks also bring weights to servers.
    """
    if not held_out.prompts:
        return {}
    sampling = held_out_sampling(config, stop_token_ids)
    rounds = rounds or Rounds(life, world.world_gloo)
    mine = held_out.prompts[world.rank :: world.world_size]
    total = len(mine) * config.eval.samples
    with life.phases("evaluate"), life.progress("held-out questions", total) as on_answer:
        counts = None
        with suppress(Interrupted):  # all ranks leave together, below
            life.stop.check()
            result = evaluate_questions(
                engine,
                mine,
                tokenizer,
                verifier,
                samples=config.eval.samples,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                seed=config.seed,
                stop_token_ids=stop_token_ids,
                on_answer=on_answer,
                on_wait=rounds.on_wait,
            )
            counts = result.counts()
        signum = rounds.wait_for_all()
        answers: list[np.ndarray | None] = gather_objects(counts, world.world_gloo)
        parts = [part for part in answers if part is not None]
        if len(parts) < len(answers):
            raise Interrupted(signum)
    return held_out_figures(parts, held_out)


def held_out_sampling(config: Config, stop_token_ids: Sequence[int]) -> SamplingParams:
    """How answers to held-out questions are drawn. stop_token_ids: the tokens that end them (end_tokens.py)."""
    settings = config.eval
    limit = settings.max_response_tokens or config.rollout.max_response_tokens
    return SamplingParams(limit, settings.temperature, settings.top_p, stop_token_ids=tuple(stop_token_ids))


def held_out_figures(parts: Sequence[np.ndarray], held_out: HeldOut) -> dict[str, float]:
    """Figures under names `eval/…` of all ranks' counts, int64 [Q of the rank, 7] each."""
    return {f"eval/{name}": value for name, value in summarize_held_out(merge_counts(parts), held_out).items()}


def summarize_held_out(counts: np.ndarray, held_out: HeldOut) -> dict[str, float]:
    """Figures of int64 [Q, 7] (questions.COUNT_COLUMNS) for metrics.jsonl.

    Copies of a question, which files made for avg@32 hold, count as one question with more answers: the 95 % interval
    is over questions. With several benchmarks `accuracy` is the mean of theirs, as in the paper, and each has its own
    `<benchmark>/accuracy`.
    """
    merged: dict[tuple[str, str], np.ndarray] = {}
    place = {prompt.index: position for position, prompt in enumerate(held_out.prompts)}
    for row in counts:
        position = place[int(row[0])]
        prompt = held_out.prompts[position]
        key = (held_out.benchmarks[position], json.dumps([prompt.messages, prompt.answer]))
        merged[key] = merged[key] + [0, *row[1:]] if key in merged else row
    summary = summarize_counts(np.array(list(merged.values())))
    scores: dict[str, list[float]] = defaultdict(list)
    for (benchmark, _), row in merged.items():
        scores[benchmark].append(row[2] / row[1])
    if len(scores) > 1:
        arrays = {name: np.array(values) for name, values in scores.items()}
        intervals = {"": macro_average(arrays)} | {f"{name}/": score_interval(s) for name, s in arrays.items()}
        for name, interval in intervals.items():
            summary[f"{name}accuracy"] = interval.mean
            summary[f"{name}accuracy_low"], summary[f"{name}accuracy_high"] = interval.low, interval.high
    return summary
