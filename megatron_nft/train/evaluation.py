"""An evaluation that training does not wait for: held-out questions that servers answer between those of the training.

All answers of an evaluation are of the version that the engine had when it began. So no new weights may come until they
are there, of all ranks; `rounds.Rounds` and `train/overlap.py` see to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from megatron_nft.config import Config
from megatron_nft.distributed import gather_objects
from megatron_nft.engines.answers import GradingAnswer, Verifier
from megatron_nft.engines.completions import version_spans
from megatron_nft.engines.engine import AnswerRequest, Completion, Engine, WeightVersionError
from megatron_nft.evaluate.questions import EvalResult, QuestionResult
from megatron_nft.train.held_out import HeldOut, World, held_out_figures, held_out_sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Evaluation:
    """One rank's part: its share of the questions. All ranks make one at the same point, and call `result` together."""

    def __init__(
        self,
        step: int,
        held_out: HeldOut,
        *,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        verifier: Verifier,
        config: Config,
        world: World,
        stop_token_ids: Sequence[int] = (),
    ) -> None:
        """Ask the questions, under the weights that the engine has. step: the one whose record gets the figures."""
        self.step, self.version = step, engine.weight_version
        self._held_out, self._tokenizer, self._verifier, self._world = held_out, tokenizer, verifier, world
        self._num_samples = config.eval.samples
        self._prompts = held_out.prompts[world.rank :: world.world_size]
        self._answers: list[dict[int, GradingAnswer]] = [{} for _ in self._prompts]  # by sample
        self._num_missing = len(self._prompts) * self._num_samples
        self._closing = ExitStack()
        self._stream = self._closing.enter_context(engine.stream(held_out_sampling(config, stop_token_ids)))
        self._stream.add(
            [
                AnswerRequest(place * self._num_samples + sample, prompt.token_ids, (config.seed, prompt.index, sample))
                for place, prompt in enumerate(self._prompts)
                for sample in range(self._num_samples)
            ]
        )

    def look(self, *, at_once: bool = True) -> bool:
        """Have graded what has been answered by now, or in a while; whether the engine has moved.

        EngineError where an answer cannot be had, WeightVersionError where one is of another version.
        """
        advance = self._stream.advance(at_once=at_once)
        for number, completion in advance.ended:
            self._check_version(completion)
            place, sample = divmod(number, self._num_samples)
            answer = GradingAnswer.begin(completion, self._prompts[place], self._tokenizer, self._verifier)
            self._answers[place][sample] = answer
            self._num_missing -= 1
        return advance.moved

    @property
    def is_answered(self) -> bool:
        """Whether this rank's questions have all of their answers; they may not be graded yet."""
        return self._num_missing == 0

    def result(self) -> dict[str, float]:
        """Figures under names `eval/…` over all ranks' answers, which are all there; waits for verdicts. Collective."""
        questions = [
            QuestionResult.of(prompt, [answers[sample].result() for sample in range(self._num_samples)])
            for prompt, answers in zip(self._prompts, self._answers, strict=True)
        ]
        counts = EvalResult(questions).counts()
        return held_out_figures(gather_objects(counts, self._world.world_gloo), self._held_out)

    def close(self) -> None:
        """Abandon what is under way. May be called twice."""
        self._closing.close()

    def _check_version(self, completion: Completion) -> None:
        versions = {version for version, _, _ in version_spans(completion)}
        if versions != {self.version}:
            raise WeightVersionError(
                f"a held-out question was answered under weight versions {sorted(versions)}, asked was {self.version}"
            )
