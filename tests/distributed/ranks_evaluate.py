"""Held-out questions inside a run when a stop signal meets one of the ranks."""

import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist
from launch import Ranks, run_checks
from tiny import make_tokenizer

from megatron_nft.config import Config
from megatron_nft.console import Console
from megatron_nft.distributed import gather_objects
from megatron_nft.engines.engine import Completion, OnWait, Request, SamplingParams
from megatron_nft.train.held_out import HeldOut, evaluate_held_out
from megatron_nft.train.lifecycle import Interrupted, Lifecycle, Phases, StopSignals
from megatron_nft.types import Prompt, Verdict
from megatron_nft.verify import Graded

QUESTIONS, SAMPLES = 8, 2


class Engine:
    """Says one token for every answer, and sends its own process a signal once it has given `signal_after` of them."""

    def __init__(self, signal_after: int | None = None) -> None:
        self.signal_after, self.given = signal_after, 0

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, on_wait: OnWait | None = None
    ) -> Iterator[tuple[int, int, Completion]]:
        for number, request in enumerate(requests):
            for sample in range(request.num_samples):
                self.given += 1
                if self.given == self.signal_after:
                    os.kill(os.getpid(), signal.SIGUSR1)
                yield number, sample, Completion(np.array([65], np.int32), np.zeros(1, np.float32), "stop", 0)


class Verifier:
    """Right are the answers to questions with an even ground truth."""

    def submit(self, response, answer, data_source="", extra=None, *, prompt_opens_thinking=False) -> Future:
        future: Future = Future()
        verdict = Verdict.WRONG if int(answer) % 2 else Verdict.CORRECT
        future.set_result(Graded(verdict, response, "parity", 0.0, {}, False, ""))
        return future


@dataclass(frozen=True)
class World:
    """All ranks of the job."""

    rank: int
    world_size: int
    world_gloo: dist.ProcessGroup


def config(ranks: Ranks) -> Config:
    return Config.model_validate(
        {
            "run_dir": str(ranks.scratch),
            "model": {"path": "unused"},
            "data": {"train": ["unused"]},
            "eval": {"samples": SAMPLES, "max_response_tokens": 4},
        }
    )


def evaluate(ranks: Ranks, engine: Engine, stop: StopSignals, verifier: Verifier) -> dict[str, float]:
    prompts = [Prompt(i, "sums", (), str(i), np.array([7], np.int32)) for i in range(QUESTIONS)]
    life = Lifecycle(Phases(ranks.rank, ranks.scratch, 600.0), stop, Console(ranks.rank))
    world = World(ranks.rank, ranks.world_size, dist.group.WORLD)
    held_out = HeldOut(prompts, ["sums"] * QUESTIONS)
    try:
        return evaluate_held_out(held_out, engine, make_tokenizer(), verifier, config(ranks), world, life)
    finally:
        life.close()


def outcome(ranks: Ranks, engine: Engine, stop: StopSignals) -> dict[str, float] | str:
    """The metrics, or what Interrupted says."""
    try:
        return evaluate(ranks, engine, stop, Verifier())
    except Interrupted as e:
        return str(e)


def check_without_a_signal_all_ranks_have_the_metrics(ranks: Ranks) -> None:
    metrics = outcome(ranks, Engine(), StopSignals())
    assert metrics["eval/accuracy"] == 0.5
    assert metrics["eval/pass@2"] == 0.5
    assert gather_objects(metrics, dist.group.WORLD) == [metrics] * ranks.world_size


def check_a_signal_on_one_rank_makes_all_abandon(ranks: Ranks) -> None:
    """At once on that rank; those that have finished hear of it when they meet."""
    engine = Engine(signal_after=3 if ranks.rank == 1 else None)
    assert outcome(ranks, engine, StopSignals()) == "stopped by SIGUSR1"
    share = QUESTIONS * SAMPLES / ranks.world_size
    assert engine.given == 3 if ranks.rank == 1 else 0 < engine.given <= share


def check_one_that_came_before_asks_nothing(ranks: Ranks) -> None:
    stop, engine = StopSignals(), Engine()
    os.kill(os.getpid(), signal.SIGTERM)
    assert outcome(ranks, engine, stop) == "stopped by SIGTERM"
    assert engine.given == 0


def check_one_that_comes_when_all_is_answered_changes_nothing(ranks: Ranks) -> None:
    class Late(Verifier):
        def submit(self, *args, **kwargs) -> Future:
            future = super().submit(*args, **kwargs)
            if ranks.rank == 0:
                result = future.result

                def with_signal() -> object:
                    os.kill(os.getpid(), signal.SIGUSR1)
                    return result()

                future.done, future.result = lambda: False, with_signal
            return future

    stop = StopSignals()
    assert evaluate(ranks, Engine(), stop, Late())["eval/accuracy"] == 0.5
    assert stop.signum == (signal.SIGUSR1 if ranks.rank == 0 else 0)  # obeyed at the end of the step


if __name__ == "__main__":
    run_checks(globals())
