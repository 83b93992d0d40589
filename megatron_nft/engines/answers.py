"""Questions in, graded answers out, with grading while generation goes on: the loop of training and of evaluation."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from megatron_nft.engines.engine import (
    WAIT_S,
    Completion,
    Engine,
    EngineError,
    OnWait,
    Request,
    SamplingParams,
    WeightVersionError,
)
from megatron_nft.types import Prompt, ReasonKind, Rollout, RolloutGroup, Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_nft.config import Config
    from megatron_nft.verify import Graded


class Verifier(Protocol):
    """The part of `verify.VerifierPool` that is used here."""

    def submit(
        self,
        response: str,
        answer: str,
        data_source: str,
        extra: dict[str, Any] | None,
        *,
        prompt_opens_thinking: bool,
    ) -> Future[Graded]:
        """Start to grade an answer."""
        ...


CUT_OFF = "cut off at rollout.max_response_tokens"
"""The reason of an answer that has no end and was not graded."""


@dataclass(frozen=True, slots=True)
class GradedAnswer:
    """One answer of an engine, and its verdict."""

    completion: Completion
    text: str  # the tokens decoded, special tokens left out
    graded: Graded | None  # None for one that was not given to the verifier


def ask_and_grade(
    engine: Engine,
    prompts: Sequence[Prompt],
    requests: Sequence[Request],
    sampling: SamplingParams,
    tokenizer: PreTrainedTokenizerBase,
    verifier: Verifier,
    *,
    grade_truncated: bool,
    on_answer: Callable[[Completion], None] | None = None,
    on_wait: OnWait | None = None,
) -> Iterator[tuple[int, list[GradedAnswer]]]:
    """Yields (number of a request, its graded answers by sample) as soon as a question is complete and graded.

    requests: one per prompt, in the same order; every one comes exactly once, in no particular order. grade_truncated:
    whether answers that were cut off at the length limit are given to the verifier. `on_answer` is called as answers
    arrive, `on_wait` as engine.OnWait says, and while verdicts are waited for. Where the engine fails, the questions
    that it had finished come before its EngineError is raised.
    """
    questions = [_OpenQuestion({}) for _ in prompts]
    answered: deque[int] = deque()  # questions with all answers, waiting for verdicts
    failure: EngineError | None = None
    try:
        for number, sample, completion in engine.generate(requests, sampling, on_wait):
            grade = grade_truncated or completion.finish_reason != "length"
            asked = verifier if grade else None
            questions[number].answers[sample] = GradingAnswer.begin(completion, prompts[number], tokenizer, asked)
            if on_answer is not None:
                on_answer(completion)
            if len(questions[number].answers) == requests[number].num_samples:
                answered.append(number)
            if on_wait is not None:
                on_wait(True)
            while answered and questions[answered[0]].is_graded:
                yield answered[0], questions[answered.popleft()].close()
    except EngineError as error:
        failure = error
    for number in answered:
        while on_wait is not None and not questions[number].wait(WAIT_S):
            on_wait(True)  # graders have limits of their own
        yield number, questions[number].close()
    if failure is not None:
        raise failure


@dataclass(frozen=True, slots=True)
class GradingAnswer:
    """One answer of an engine whose verdict may be under way."""

    completion: Completion
    text: str  # the tokens decoded, special tokens left out
    verdict: Future[Graded] | None  # None for one that was not given to the verifier

    @classmethod
    def begin(
        cls, completion: Completion, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, verifier: Verifier | None
    ) -> GradingAnswer:
        """Give an answer to the verifier, where there is one."""
        text = cast(str, tokenizer.decode(completion.token_ids.tolist(), skip_special_tokens=True))  # of one answer
        if verifier is None:
            return cls(completion, text, None)
        opens = prompt.opens_thinking
        verdict = verifier.submit(text, prompt.answer, prompt.data_source, prompt.extra, prompt_opens_thinking=opens)
        return cls(completion, text, verdict)

    @property
    def is_graded(self) -> bool:
        return self.verdict is None or self.verdict.done()

    def result(self) -> GradedAnswer:
        """The answer with its verdict, which is waited for."""
        return GradedAnswer(self.completion, self.text, None if self.verdict is None else self.verdict.result())


@dataclass(slots=True)
class _OpenQuestion:
    """A question whose answers are arriving."""

    answers: dict[int, GradingAnswer]  # by sample

    @property
    def is_graded(self) -> bool:
        return all(answer.is_graded for answer in self.answers.values())

    def wait(self, timeout_s: float) -> bool:
        """Wait for the verdicts, at most `timeout_s` seconds; whether all are there."""
        futures = [answer.verdict for answer in self.answers.values() if answer.verdict is not None]
        return not wait(futures, timeout_s).not_done

    def close(self) -> list[GradedAnswer]:
        """The answers by sample; waits for verdicts that are not there yet, and lets go of the token ids."""
        return [self.answers.pop(sample).result() for sample in sorted(self.answers)]


def training_sampling(config: Config, stop_token_ids: Sequence[int] = ()) -> SamplingParams:
    """Return how answers for training are drawn. stop_token_ids: the tokens that end them (end_tokens.py)."""
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
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: Sequence[int] = (),
    on_progress: Callable[[int, int], None] | None = None,
    on_wait: OnWait | None = None,
) -> tuple[list[RolloutGroup], float]:
    """`rollout.answers_per_question` graded answers to each drawn question, groups in the order of `draws`.

    Answers cut off at the length limit are not graded: they are wrong (`algorithm.truncated=negative`) or left out of
    the loss (`drop`). `on_progress(done, total)` is called after every answer,
    `on_wait` as engine.OnWait says. WeightVersionError where the engine or
    an answer is of another version than `weight_version`.

    The second value is the seconds from the last answer to the last verdict: what grading adds to the step.
    """
    if engine.weight_version != weight_version:
        raise WeightVersionError(f"the engine has weight version {engine.weight_version}, not {weight_version}")
    num_samples = config.rollout.answers_per_question
    requests = [Request(prompt.token_ids, num_samples, (config.seed, draw)) for draw, prompt in draws]
    num_answers, last_answer = 0, time.perf_counter()

    def on_answer(_: Completion) -> None:
        nonlocal num_answers, last_answer
        num_answers, last_answer = num_answers + 1, time.perf_counter()
        if on_progress is not None:
            on_progress(num_answers, num_samples * len(draws))

    groups: dict[int, RolloutGroup] = {}
    for number, answers in ask_and_grade(
        engine,
        [prompt for _, prompt in draws],
        requests,
        training_sampling(config, stop_token_ids),
        tokenizer,
        verifier,
        grade_truncated=False,
        on_answer=on_answer,
        on_wait=on_wait,
    ):
        draw, prompt = draws[number]
        rollouts = [to_rollout(draw, i, answer, config.algorithm.truncated) for i, answer in enumerate(answers)]
        groups[number] = RolloutGroup(draw, prompt, rollouts, step)
    return [groups[number] for number in range(len(draws))], time.perf_counter() - last_answer


def to_rollout(draw: int, sample: int, answer: GradedAnswer, truncated: str) -> Rollout:
    """Return an answer as a rollout. truncated: algorithm.truncated, for an answer that was not graded."""
    completion, graded = answer.completion, answer.graded
    rollout = Rollout(
        draw=draw,
        sample_index=sample,
        response_ids=completion.token_ids,
        rollout_logprobs=completion.logprobs,
        finish_reason=completion.finish_reason,
        weight_version=completion.weight_version,
        text=answer.text,
        weight_version_spans=completion.weight_version_spans,
    )
    if graded is None:
        rollout.verdict, rollout.ignored = Verdict.WRONG, truncated == "drop"
        rollout.reason, rollout.reason_kind = CUT_OFF, ReasonKind.CUT_OFF
        return rollout
    rollout.verdict, rollout.extracted, rollout.verify_s = graded.verdict, graded.extracted, graded.seconds
    rollout.grader_verdicts, rollout.ignored = graded.by_grader, graded.ignored
    rollout.reason, rollout.reason_kind, rollout.reward = graded.reason, graded.reason_kind, graded.reward
    return rollout
