"""What servers do while the trainer trains (rollout.mode=overlapped): answers of the next steps, held-out questions.

    step 4 ends: sync of version 4, evaluation of step 4 begins -----------------------------> ends: sync of version 6
    step 5 is generated with version 4, trained; its sync is put off
    step 6 is generated with version 4, trained; its sync is put off, and made as soon as the evaluation lets it

A sync may be put off as long as the engine is at most `max_staleness` versions behind the trainer. After the step that
would make it more, the trainer waits. docs/nft.md has the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from megatron_nft.engines.end_tokens import token_ids
from megatron_nft.metrics import Metrics
from megatron_nft.train import record
from megatron_nft.train.checkpoints import RunState
from megatron_nft.train.evaluation import Evaluation
from megatron_nft.train.lifecycle import Interrupted
from megatron_nft.train.meanwhile import Meanwhile
from megatron_nft.train.parts import Parts
from megatron_nft.train.rounds import Rounds
from megatron_nft.train.step_record import evaluates_after, write_record
from megatron_nft.train.streaming import Producer
from megatron_nft.train.sync import readmit, sync_weights

if TYPE_CHECKING:
    import torch.distributed as dist


class Overlap:
    """The producer of a run and the evaluation under way, if one is. All ranks make the same calls.

    The engine is behind the trainer only while an evaluation is under way.
    """

    def __init__(
        self, parts: Parts, producer: Producer, group: dist.ProcessGroup | None, *, evaluation_due: bool
    ) -> None:
        """group: of all ranks, for the producer's thread. evaluation_due: RunState.evaluation_due."""
        self._parts, self.producer = parts, producer
        self._group, self._meanwhile = group, Meanwhile(group)
        self.evaluation: Evaluation | None = None
        self.is_owed = evaluation_due  # an evaluation could not be ended under its weights, and is to be begun anew

    def begin_evaluation(self, step: int) -> None:
        """Begin the evaluation of `step`, whose weights the engine has. The one before has ended."""
        assert self.evaluation is None, "one evaluation at a time"
        self.is_owed, questions = False, self._parts.questions
        if questions.held_out.prompts:
            self.evaluation = Evaluation(
                step,
                questions.held_out,
                engine=self._parts.engine,
                tokenizer=questions.tokenizer,
                verifier=self._parts.verifier,
                config=self._parts.config,
                world=self._parts.layout,
                stop_token_ids=token_ids(questions.end_tokens),
            )

    def hold(self, state: RunState) -> RunState:
        """`state`, of the last complete step, for a checkpoint. What servers have of running answers is asked for where
        the last sync did not make them tell it (sync.in_flight=continue)."""
        in_flight = self._parts.config.sync.in_flight_for("overlapped")
        with self._parts.life.phases("generate"):
            held = self.producer.hold(state, interrupt=in_flight == "continue")
        return replace(held, evaluation_due=self.is_owed)

    def begin_training(self, state: RunState) -> None:
        """Let the producer go on by itself while the step after `state` is trained."""
        self._meanwhile.start(partial(self.producer.go_on, state, self._group))

    def end_training(self) -> None:
        """Take the producer back. Collective. Raises what stopped it, if something did."""
        with self._parts.life.phases("generate"):
            self._meanwhile.end()

    def open_rounds(self, state: RunState, metrics: Metrics) -> Rounds:
        """What ranks tell each other while they generate the step after `state`.

        A sync that was put off is made as soon as the evaluation has ended. It is made at once where servers came back,
        since the weights of the evaluation are overwritten: that is begun anew under those of `state`.
        """

        def catch_up() -> None:
            if self._parts.engine.weight_version != state.weight_version:
                self.sync(state.weight_version, metrics)

        def end() -> None:
            self.end_evaluation()
            catch_up()

        def bring_weights(urls: Sequence[str]) -> None:
            if self._parts.engine.weight_version == state.weight_version:
                self._readmit(urls, state.weight_version)
                return
            self._give_up_evaluation(but=state.step)
            catch_up()
            self.begin_evaluation(state.step)

        return self._rounds(bring_weights, end)

    def lets_sync(self, step: int, version: int) -> bool:
        """Whether the engine may take the weights of `step`, which are of `version`: no evaluation is under way, or it
        ends here. It is waited for where the sync may not be put off again. Collective.

        False after a stop signal too, which is obeyed at the end of the step.
        """
        if self.evaluation is not None:
            config = self._parts.config
            behind = version - self._parts.engine.weight_version
            must_end = behind > config.rollout.max_staleness or evaluates_after(step, config)
            # A server that comes back meanwhile cannot have the weights of the evaluation.
            rounds = self._rounds(lambda _: self._give_up_evaluation(), self.end_evaluation)
            with self._parts.life.phases("evaluate_wait"), suppress(Interrupted):
                self._look(rounds, until_it_ends=must_end)
        return self.evaluation is None

    def sync(self, version: int, metrics: Metrics) -> None:
        """The policy's weights into all engines, as `version`. Collective."""
        parts, questions = self._parts, self._parts.questions
        costs = sync_weights(parts.sync, parts.engine, parts.policy, questions.stream, questions.tokenizer, version)
        record.add_sync(metrics, costs)

    def end_evaluation(self) -> dict[str, float]:
        """Figures of the evaluation whose answers are there, of all ranks; records that were held back are written with
        them. Collective."""
        assert self.evaluation is not None
        evaluation, self.evaluation = self.evaluation, None
        evaluation.close()
        figures = evaluation.result()
        for step in self._parts.recorder.held_steps:
            write_record(self._parts, step, figures if step == evaluation.step else {})
        return figures

    def end_last_evaluation(self, version: int) -> dict[str, float]:
        """Wait for the evaluation of the last step, whose weights are of `version`. Collective. Interrupted after a
        stop signal."""
        figures: dict[str, float] = {}
        rounds = self._rounds(lambda urls: self._readmit(urls, version), lambda: figures.update(self.end_evaluation()))
        with self._parts.life.phases("evaluate_wait"):
            self._look(rounds, until_it_ends=True)
        return figures

    def stop(self, state: RunState) -> RunState:
        """End what is under way. Returns `state`, of the last complete step, with what there is of it. Collective."""
        if self.evaluation is not None:
            self._give_up_evaluation(but=state.step)  # whose record the checkpoint takes along
        self.producer.stop()
        return replace(self.producer.hold(state), evaluation_due=self.is_owed)

    def close(self) -> None:
        """Abandon what is under way. May be called twice."""
        if self.evaluation is not None:
            self.evaluation.close()
            self.evaluation = None
        self._meanwhile.close()
        self.producer.close()

    def _look(self, rounds: Rounds, *, until_it_ends: bool) -> None:
        """Let all ranks see whether the evaluation has ended; `rounds` end it."""
        rounds.meet(None, False)
        while until_it_ends and self.evaluation is not None:
            rounds.meet(None, self.evaluation.look(at_once=False))

    def _rounds(self, bring_weights: Callable[[list[str]], None], end: Callable[[], object]) -> Rounds:
        life, layout, engine = self._parts.life, self._parts.layout, self._parts.engine
        return Rounds(life, layout.world_gloo, engine.left_behind, bring_weights, lambda: self.evaluation, end)

    def _readmit(self, urls: Sequence[str], version: int) -> None:
        parts, questions = self._parts, self._parts.questions
        say = parts.life.console.say
        readmit(urls, parts.sync, parts.policy, questions.stream, questions.tokenizer, version, say)

    def _give_up_evaluation(self, but: int | None = None) -> None:
        """Abandon the evaluation under way, and write the records that were held back for it, but that of one step."""
        assert self.evaluation is not None
        self.evaluation.close()
        self.evaluation, self.is_owed = None, True
        for step in self._parts.recorder.held_steps:
            if step != but:
                write_record(self._parts, step, {})
