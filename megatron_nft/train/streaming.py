"""Generation of a step in `rollout.mode=streaming`: until the groups that it trains are known.

    rounds:  start questions that the window admits -> answers go on for a while -> verdicts -> all ranks tell each
             other which groups are complete, and what they are worth
    end:     the first N kept groups in draw order are known: answers under way are stopped, and kept for the next step

All ranks see the same groups complete in the same round, so each knows by itself which questions are started and when
the phase ends.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_nft.algorithms import Algorithm
from megatron_nft.config import Config
from megatron_nft.data.prompts import PromptStream
from megatron_nft.distributed import gather_objects
from megatron_nft.engines.answers import training_sampling
from megatron_nft.engines.end_tokens import EndToken, token_ids
from megatron_nft.engines.engine import AnswerStream, Engine, WeightVersionError
from megatron_nft.metrics import Metrics
from megatron_nft.policy.parallel import ParallelLayout
from megatron_nft.train import record
from megatron_nft.train.buffer import RolloutBuffer
from megatron_nft.train.checkpoints import RunState
from megatron_nft.train.collect import Collected, empty_batch, grading_failed, judge, shuffle_verdicts
from megatron_nft.train.lifecycle import Interrupted
from megatron_nft.train.reasons import Outcomes
from megatron_nft.train.rounds import Rounds
from megatron_nft.train.schedule import GroupFacts
from megatron_nft.train.window import Window
from megatron_nft.types import RolloutGroup
from megatron_nft.verify import VerifierPool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StreamInterrupted(Interrupted):
    """A stop signal during generation. `state` is that of the last complete step with what was generated since."""

    def __init__(self, signum: int, state: RunState) -> None:
        super().__init__(signum)
        self.state = state


def collect_streaming(
    state: RunState,
    metrics: Metrics,
    *,
    engine: Engine,
    verifier: VerifierPool,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    layout: ParallelLayout,
    stream: PromptStream,
    algorithm: Algorithm,
    rounds: Rounds,
    end_tokens: Sequence[EndToken] = (),
) -> Collected:
    """Generate until the groups of the step after `state` are known. Collective. Errors as those of `collect`;
    StreamInterrupted after a stop signal on any rank."""
    if engine.weight_version != state.weight_version:
        raise WeightVersionError(f"the engine has weight version {engine.weight_version}, not {state.weight_version}")
    stream.cursor = state.cursor
    buffer = RolloutBuffer(state.waiting, config, tokenizer, verifier)
    phase = _Phase(buffer, state, config, layout, stream, algorithm)
    with engine.stream(training_sampling(config, token_ids(end_tokens))) as answers:
        try:
            phase.run(answers, rounds, engine.is_deterministic)
        except Interrupted as interrupted:
            phase.stop(answers)
            held = replace(state, cursor=stream.cursor, waiting=buffer.snapshot())
            raise StreamInterrupted(interrupted.signum, held) from None
        phase.stop(answers)
    return phase.finish(metrics, end_tokens)


class _Phase:
    """One phase of generation on one rank, and what all ranks know of it."""

    def __init__(
        self,
        buffer: RolloutBuffer,
        state: RunState,
        config: Config,
        layout: ParallelLayout,
        stream: PromptStream,
        algorithm: Algorithm,
    ) -> None:
        self._buffer, self._state, self._config, self._layout = buffer, state, config, layout
        self._stream, self._algorithm = stream, algorithm
        self._needed = config.train.questions_per_step
        waiting = gather_objects([group.draw for group in state.waiting], layout.world_gloo)
        size = (config.rollout.max_staleness + 1) * self._needed
        self._window = Window(size, (draw for draws in waiting for draw in draws))
        self._facts: dict[int, GroupFacts] = {}  # of complete groups, the same on every rank
        self._outcomes = Outcomes()  # of their answers
        self._found = Collected([], [], [], {}, state.cursor)
        self._own: dict[int, RolloutGroup] = {}  # this rank's complete groups
        self._verify_wait_s = 0.0
        self._tokens_before = buffer.num_tokens

    def run(self, answers: AnswerStream, rounds: Rounds, is_deterministic: bool) -> None:
        """Until the groups of the step are known, or cannot be had."""
        old = self._buffer.too_old(self._state.weight_version)
        self._hear(rounds.meet(self._tell(old, "too_old"), True))
        answers.add(self._buffer.requests())
        while not self._is_decided:
            answers.add(self._buffer.requests(self._start_questions()))
            advance = answers.advance()
            for number, completion in advance.ended:
                self._buffer.add(number, completion)
            # Where a run must repeat itself, no verdict may come in a later round than the other time.
            self._take_verdicts(None if is_deterministic else 0.0)
            self._hear(rounds.meet(self._tell(self._buffer.complete()), advance.moved))

    @property
    def _is_decided(self) -> bool:
        limit = self._config.rollout.max_generation_batches * self._config.rollout.questions_per_batch
        ready = self._window.next_groups(self._needed) is not None
        return ready or len(self._facts) >= limit or self._lacks_verdicts

    @property
    def _lacks_verdicts(self) -> bool:
        """Whether too many answers have no verdict, once there are as many as a step trains."""
        enough = self._needed * self._config.rollout.answers_per_question
        return self._outcomes.answers >= enough and self._outcomes.missing_share > self._config.verify.max_failure_share

    def _start_questions(self) -> list[int]:
        """Draw the questions that the window admits; returns the draws that this rank owns."""
        own = []
        for draw, prompt in self._stream.draw(self._window.room):
            self._window.start(draw)
            if draw % self._layout.world_size == self._layout.rank:
                self._buffer.open(draw, prompt)
                own.append(draw)
        return own

    def _take_verdicts(self, timeout_s: float | None) -> None:
        start = time.perf_counter()
        self._buffer.take_verdicts(timeout_s)
        self._verify_wait_s += time.perf_counter() - start

    def _tell(self, groups: list[RolloutGroup], fate: str | None = None) -> tuple[list[GroupFacts], Outcomes]:
        """What the other ranks get to know of this rank's groups. fate: of all of them, where that is known."""
        if self._config.verify.shuffle_within_groups:
            shuffle_verdicts(groups, self._config.seed)
        facts = []
        for group in groups:
            fact, samples = judge(group, self._layout.rank, self._algorithm, fate)
            self._found.samples |= samples
            self._own[group.draw] = group
            facts.append(fact)
        return facts, Outcomes.of(groups)

    def _hear(self, ranks: list[tuple[list[GroupFacts], Outcomes]]) -> None:
        for facts, outcomes in ranks:
            self._outcomes.add(outcomes)
            for fact in facts:
                self._facts[fact.draw] = fact
                self._window.decide(fact.draw, kept=fact.fate == "kept")

    def stop(self, answers: AnswerStream) -> None:
        """Keep what there is of the answers under way."""
        for number, completion in answers.stop():
            self._buffer.add(number, completion)
        self._take_verdicts(None)

    def finish(self, metrics: Metrics, end_tokens: Sequence[EndToken]) -> Collected:
        """The groups that the step trains and those that were dropped; what goes on in the next step."""
        found, step, draws = self._found, self._state.step + 1, self._window.next_groups(self._needed)
        chosen = [self._facts[draw] for draw in draws or ()]
        dropped = [fact for fact in self._facts.values() if fact.fate != "kept"]
        leaving = sorted([*chosen, *dropped], key=lambda fact: fact.draw)
        own = [fact for fact in leaving if fact.draw in self._own]
        found.groups, found.fates = [self._own[fact.draw] for fact in own], [fact.fate for fact in own]
        if draws is None:
            if self._lacks_verdicts:
                raise grading_failed(found, step, self._outcomes, self._config, self._layout)
            found.kept = [fact for fact in self._facts.values() if fact.fate == "kept"]
            seen = Counter(fact.fate for fact in self._facts.values())
            raise empty_batch(found, step, seen, self._outcomes, self._config, self._layout, end_tokens)
        generated = self._buffer.num_tokens - self._tokens_before
        self._window.remove(draws)
        self._buffer.remove(fact.draw for fact in leaving)
        found.kept, found.cursor, found.waiting = chosen, self._stream.cursor, self._buffer.snapshot()
        record.add_rollouts(metrics, found.groups, self._verify_wait_s, tokens_generated=generated)
        record.add_groups(metrics, self._layout.rank, leaving)
        record.add_stream(metrics, found.groups, found.waiting)
        return found
