"""Rollouts of one generation batch: questions in, graded groups out, grading while generation goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol

from megatron_nft.engines.engine import Completion, Engine, Request, SamplingParams, WeightVersionError
from megatron_nft.types import Prompt, Rollout, RolloutGroup, Verdict

if TYPE_CHECKING:
    from megatron_nft.config import Config


class Verifier(Protocol):
    """The part of `verify.VerifierPool` that is used here."""

    def submit(self, response: str, answer: str, data_source: str = "", extra: dict[str, Any] | None = None) -> Future:
        """Future of a `verify.Graded`."""
        ...


CUT_OFF = "cut off at rollout.max_response_tokens"
"""The reason of an answer that has no end and was not graded."""


def training_sampling(config: Config, stop_token_ids: Sequence[int] = ()) -> SamplingParams:
    """How answers for training are drawn. stop_token_ids: the tokens that end them (end_tokens.py)."""
    rollout = config.rollout
    limits = (rollout.max_response_tokens, rollout.temperature, rollout.top_p, rollout.top_k)
    return SamplingParams(*limits, stop_token_ids=tuple(stop_token_ids))


def generate_groups(
    engine: Engine,
    draws: Sequence[tuple[int, Prompt]],
    config: Config,
    verifier: Verifier,
    *,
    step: int,
    weight_version: int,
    tokenizer: Any,
    stop_token_ids: Sequence[int] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[list[RolloutGroup], float]:
    """`rollout.answers_per_question` graded answers to each drawn question, groups in the order of `draws`.

    Answers cut off at the length limit are not graded: they are wrong (`algorithm.truncated=negative`) or left out of
    the loss (`drop`). `on_progress(done, total)` is called after every answer. WeightVersionError where the engine or
    an answer is of another version than `weight_version`.

    The second value is `verify_wait_s`, the seconds from the last answer to the last verdict: what grading adds to the
    step.
    """
    if engine.weight_version != weight_version:
        raise WeightVersionError(f"the engine has weight version {engine.weight_version}, not {weight_version}")
    num_samples = config.rollout.answers_per_question
    requests = [Request(prompt.token_ids, num_samples, (config.seed, draw)) for draw, prompt in draws]
    groups = [RolloutGroup(draw, prompt, [None] * num_samples, step) for draw, prompt in draws]
    pending: list[tuple[Rollout, Future]] = []
    total = num_samples * len(draws)
    answers = engine.generate(requests, training_sampling(config, stop_token_ids))
    for done, (request, sample, completion) in enumerate(answers, start=1):
        draw, prompt = draws[request]
        rollout = _to_rollout(draw, sample, completion, tokenizer)
        groups[request].rollouts[sample] = rollout
        if completion.finish_reason == "length":
            rollout.verdict, rollout.reason = Verdict.WRONG, CUT_OFF
            rollout.ignored = config.algorithm.truncated == "drop"
        else:
            future = verifier.submit(rollout.text, prompt.answer, prompt.data_source, prompt.extra)
            pending.append((rollout, future))
        if on_progress is not None:
            on_progress(done, total)
    generated = time.perf_counter()
    for rollout, future in pending:
        graded = future.result()
        rollout.verdict, rollout.extracted, rollout.verify_s = graded.verdict, graded.extracted, graded.seconds
        rollout.ignored, rollout.reason = graded.ignored, graded.reason
        rollout.grader_verdicts = graded.by_grader
    return groups, time.perf_counter() - generated


def _to_rollout(draw: int, sample: int, completion: Completion, tokenizer: Any) -> Rollout:
    return Rollout(
        draw=draw,
        sample_index=sample,
        response_ids=completion.token_ids,
        rollout_logprobs=completion.logprobs,
        finish_reason=completion.finish_reason,
        weight_version=completion.weight_version,
        text=tokenizer.decode(completion.token_ids.tolist(), skip_special_tokens=True),
        weight_version_spans=completion.weight_version_spans,
    )
