"""Generation of a step where answers outlive it (rollout.mode): until the groups that the step trains are known.

    rounds:  start questions that the window admits -> answers go on for a while -> verdicts -> all ranks tell each
             other which groups are complete, and what they are worth
    end:     the first N kept groups in draw order are known. `streaming`: answers under way are stopped, and kept for
             the next step. `overlapped`: they go on while the step is trained

All ranks see the same groups complete in the same round, so each knows by itself which questions are started and when
the phase ends.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_nft.algorithms import Algorithm
from megatron_nft.config import Config
from megatron_nft.data.choice import Choice
from megatron_nft.data.prompts import PromptStream
from megatron_nft.distributed import gather_objects
from megatron_nft.engines.answers import training_sampling
from megatron_nft.engines.end_tokens import EndToken, token_ids
from megatron_nft.engines.engine import Advance, AnswerRequest, AnswerStream, Engine, WeightVersionError
from megatron_nft.metrics import Metrics
from megatron_nft.policy.parallel import ParallelLayout
from megatron_nft.train import record
from megatron_nft.train.buffer import RolloutBuffer
from megatron_nft.train.checkpoints import RunState
from megatron_nft.train.choosing import Memory, Rate, draw_questions, rates_of
from megatron_nft.train.collect import Collected, empty_batch, grading_failed, judge, shuffle_verdicts
from megatron_nft.train.lifecycle import Interrupted
from megatron_nft.train.meanwhile import Meet
from megatron_nft.train.reasons import Outcomes
from megatron_nft.train.rounds import Rounds
from megatron_nft.train.schedule import GroupFacts, SampleKey
from megatron_nft.train.window import Window
from megatron_nft.types import RolloutGroup, TrainingSample
from megatron_nft.verify import VerifierPool

if TYPE_CHECKING:
    import torch.distributed as dist
    from transformers import PreTrainedTokenizerBase


Told = tuple[list[GroupFacts], Outcomes, list[Rate]]
"""What a rank tells of its groups in a round."""


class StreamInterrupted(Interrupted):
    """A stop signal during generation. `state` is that of the last complete step with what was generated since."""

    def __init__(self, signum: int, state: RunState) -> None:
        super().__init__(signum)
        self.state = state


class Producer:
    """One rank's part in the generation of steps, and what all ranks know of it. All ranks make the same calls.

    In `streaming` a producer lives for one step, and everything that goes on is in the RunState. In `overlapped` it
    lives as long as the run: answers go on while the trainer trains and the weights are swapped under them, and further
    questions are started in rounds of another thread, to which the producer belongs meanwhile (`go_on`).
    """

    def __init__(
        self,
        state: RunState,
        *,
        engine: Engine,
        verifier: VerifierPool,
        tokenizer: PreTrainedTokenizerBase,
        config: Config,
        layout: ParallelLayout,
        stream: PromptStream,
        algorithm: Algorithm,
        choice: Choice | None = None,
        end_tokens: Sequence[EndToken] = (),
    ) -> None:
        """Go on from `state`. Collective."""
        self._engine, self._config, self._layout = engine, config, layout
        self._stream, self._algorithm, self._end_tokens = stream, algorithm, end_tokens
        self._choice, self._memory = choice, Memory(state.past, state.ahead)
        self._asked = self._skipped = 0  # draws that no step has counted yet
        self._overlaps = config.rollout.mode == "overlapped"
        self._needed = config.train.questions_per_step
        stream.cursor = state.cursor
        self._buffer = RolloutBuffer(state.waiting, config, tokenizer, verifier)
        waiting = gather_objects([group.draw for group in state.waiting], layout.world_gloo)
        self._window = Window(draw for draws in waiting for draw in draws)
        self._facts: dict[int, GroupFacts] = {}  # of complete groups, the same on every rank
        self._own: dict[int, RolloutGroup] = {}  # this rank's complete groups
        self._samples: dict[SampleKey, TrainingSample] = {}  # of those that are kept
        self._closing = ExitStack()
        self._answers: AnswerStream | None = None  # under way
        self._is_new = False  # the stream has not got the answers that were stopped
        self._num_tokens = self._buffer.num_tokens  # of those, that earlier steps have counted
        self._outcomes = Outcomes()  # of the answers of groups that were found complete since the last step
        self._num_complete = 0
        self._verify_wait_s = 0.0  # that no step has counted yet: `hold` waits after the record of its step

    def collect(self, state: RunState, metrics: Metrics, rounds: Rounds) -> Collected:
        """Generate until the groups of the step after `state` are known. Collective.

        Errors as those of `collect.collect`; StreamInterrupted after a stop signal on any rank.
        """
        if not 0 <= self._lag(state) <= (self._config.rollout.max_staleness if self._overlaps else 0):
            has, wanted = self._engine.weight_version, state.weight_version
            raise WeightVersionError(f"the engine has weight version {has}, not {wanted}")
        answers = self._open()
        try:
            self._run(answers, rounds, state)
        except Interrupted as interrupted:
            self.stop()
            raise StreamInterrupted(interrupted.signum, self.hold(state)) from None
        if not self._overlaps:
            self.stop()
        found = self._finish(metrics, state.step + 1)
        self._outcomes, self._num_complete = Outcomes(), 0
        if self._overlaps:
            answers.add(self._start_questions(self._config.rollout.max_staleness - self._lag(state)))
        return found

    def go_on(self, state: RunState, group: dist.ProcessGroup | None, meet: Meet) -> None:
        """One round while the step after `state` is trained. Collective over `group`, by `meet`."""
        answers = self._open()
        self._take(answers.advance(at_once=True))
        self._take_verdicts(0.0)
        self._hear(meet(self._tell(self._buffer.complete())))
        answers.add(self._start_questions(self._config.rollout.max_staleness - self._lag(state), group))

    def hold(self, state: RunState, *, interrupt: bool = False) -> RunState:
        """`state` with the open groups as they are known now, verdicts of what has ended included.

        interrupt: let servers tell what there is of answers under way, which go on.
        """
        if self._answers is not None:
            if interrupt:
                self._answers.interrupt()
            self._take(self._answers.advance(at_once=True))
            self._take_verdicts(None)
        return replace(state, cursor=self._stream.cursor, waiting=self._buffer.snapshot())

    def stop(self) -> None:
        """End the answers under way, and keep what there is of them."""
        if self._answers is not None:
            for number, completion in self._answers.stop():
                self._buffer.add(number, completion)
            self._take_verdicts(None)
            self.close()

    def close(self) -> None:
        """Abandon what is under way. May be called twice."""
        self._answers = None
        self._closing.close()

    def _lag(self, state: RunState) -> int:
        """Weight syncs that were put off, for an evaluation beside the training."""
        return state.weight_version - self._engine.weight_version

    def _open(self) -> AnswerStream:
        """The stream of this producer; a new one goes on with all answers that have not ended."""
        if self._answers is None:
            sampling = training_sampling(self._config, token_ids(self._end_tokens))
            self._answers = self._closing.enter_context(self._engine.stream(sampling))
            self._is_new = True
        return self._answers

    def _run(self, answers: AnswerStream, rounds: Rounds, state: RunState) -> None:
        """Until the groups of the step are known, or cannot be had."""
        self._hear(rounds.meet(self._tell(self._buffer.too_old(state.weight_version), "too_old"), True))
        self._hear(rounds.meet(self._tell(self._buffer.complete()), True))
        if self._is_new:
            answers.add(self._buffer.requests())
            self._is_new = False
        while not self._is_decided:
            answers.add(self._start_questions(self._config.rollout.max_staleness + 1 - self._lag(state)))
            advance = answers.advance()
            self._take(advance)
            # Where a run must repeat itself, no verdict may come in a later round than the other time.
            self._take_verdicts(None if self._engine.is_deterministic else 0.0)
            self._hear(rounds.meet(self._tell(self._buffer.complete()), advance.moved))

    @property
    def _is_decided(self) -> bool:
        limit = self._config.rollout.max_generation_batches * self._config.rollout.questions_per_batch
        ready = self._window.next_groups(self._needed) is not None
        return ready or self._num_complete >= limit or self._lacks_verdicts

    @property
    def _lacks_verdicts(self) -> bool:
        """Whether too many answers have no verdict, once there are as many as a step trains."""
        enough = self._needed * self._config.rollout.answers_per_question
        return self._outcomes.answers >= enough and self._outcomes.missing_share > self._config.verify.max_failure_share

    def _start_questions(self, steps: int, group: dist.ProcessGroup | None = None) -> list[AnswerRequest]:
        """Draw the questions that may be started while fewer groups than `steps` train are open; returns the requests
        of those that this rank owns. group: where ranks meet, if not in that of the world."""
        own = []
        if not (count := self._window.room(steps * self._needed)):
            return []
        group = group or self._layout.world_gloo
        drawn, skipped = draw_questions(self._stream, count, self._choice, self._memory.past, group)
        self._asked, self._skipped = self._asked + count, self._skipped + skipped
        for draw, prompt in drawn:
            self._window.start(draw)
            if draw % self._layout.world_size == self._layout.rank:
                self._buffer.open(draw, prompt)
                own.append(draw)
        return self._buffer.requests(own)

    def _take(self, advance: Advance) -> None:
        for number, completion in [*advance.ended, *advance.begun]:
            self._buffer.add(number, completion)

    def _take_verdicts(self, timeout_s: float | None) -> None:
        start = time.perf_counter()
        self._buffer.take_verdicts(timeout_s)
        self._verify_wait_s += time.perf_counter() - start

    def _tell(self, groups: list[RolloutGroup], fate: str | None = None) -> Told:
        """What the other ranks get to know of this rank's groups. fate: of all of them, where that is known."""
        if self._config.verify.shuffle_within_groups:
            shuffle_verdicts(groups, self._config.seed)
        facts = []
        for group in groups:
            fact, samples = judge(group, self._layout.rank, self._algorithm, fate)
            self._samples |= samples
            self._own[group.draw] = group
            facts.append(fact)
        rates = [] if self._choice is None else rates_of(groups, [fact.fate for fact in facts])
        return facts, Outcomes.of(groups), rates

    def _hear(self, ranks: list[Told]) -> None:
        for facts, outcomes, rates in ranks:
            self._outcomes.add(outcomes)
            self._memory.add(rates)
            self._num_complete += len(facts)
            for fact in facts:
                self._facts[fact.draw] = fact
                self._window.decide(fact.draw, kept=fact.fate == "kept")

    def _finish(self, metrics: Metrics, step: int) -> Collected:
        """The groups that the step trains and those that were dropped, which the producer lets go of."""
        draws = self._window.next_groups(self._needed)
        if draws is None:
            raise self._failure(step)
        chosen = [self._facts[draw] for draw in draws]
        dropped = [fact for fact in self._facts.values() if fact.fate != "kept"]
        leaving = sorted([*chosen, *dropped], key=lambda fact: fact.draw)
        generated = self._buffer.num_tokens - self._num_tokens
        self._window.remove(draws)
        self._buffer.remove(fact.draw for fact in leaving)
        self._num_tokens = self._buffer.num_tokens
        self._memory.count_up_to(draws[-1])
        found = Collected(chosen, [], [], {}, self._stream.cursor, self._memory.past, waiting=self._buffer.snapshot())
        for fact in leaving:
            del self._facts[fact.draw]
            if fact.draw in self._own:
                found.groups.append(self._own.pop(fact.draw))
                found.fates.append(fact.fate)
        found.ahead = self._memory.ahead(self._facts)
        gone = {fact.draw for fact in leaving}
        found.samples = {key: sample for key, sample in self._samples.items() if key[0] in gone}
        self._samples = {key: sample for key, sample in self._samples.items() if key[0] not in gone}
        record.add_rollouts(metrics, found.groups, self._verify_wait_s, tokens_generated=generated)
        self._verify_wait_s = 0.0
        record.add_groups(metrics, self._layout.rank, leaving)
        record.add_choice(metrics, self._layout.rank, asked=self._asked, skipped=self._skipped)
        self._asked = self._skipped = 0
        record.add_stream(metrics, found.groups, found.waiting)
        return found

    def _failure(self, step: int) -> Exception:
        """Write the rollouts of a step that found too few groups; returns its error. Collective."""
        facts = sorted(self._facts.values(), key=lambda fact: fact.draw)
        own = [fact for fact in facts if fact.draw in self._own]
        groups, fates = [self._own[fact.draw] for fact in own], [fact.fate for fact in own]
        kept = [fact for fact in facts if fact.fate == "kept"]
        found = Collected(kept, groups, fates, self._samples, self._stream.cursor)
        if self._lacks_verdicts:
            return grading_failed(found, step, self._outcomes, self._config, self._layout)
        seen = Counter(fact.fate for fact in facts)
        return empty_batch(found, step, seen, self._outcomes, self._config, self._layout, self._end_tokens)
