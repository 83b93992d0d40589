"""One rank's answers between their first token and their training: unfinished, graded, and in groups that wait.

Every draw has one owner, the rank `draw % world size`: it asks for the answers, has them graded, and keeps them until
the group is trained or dropped. What a group is worth is known when all of its answers are graded; all ranks are told
(`train/streaming.py`), and then agree by the same window on what trains next.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import wait
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from megatron_nft.config import Config
from megatron_nft.engines.answers import GradingAnswer, Verifier, to_rollout
from megatron_nft.engines.completions import version_spans
from megatron_nft.engines.engine import AnswerRequest, Completion
from megatron_nft.types import Prompt, Rollout, RolloutGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class OpenGroup:
    """A question that was started and whose group is neither trained nor dropped."""

    draw: int
    prompt: Prompt
    begun: dict[int, Completion] = field(default_factory=dict)  # by sample: what there is of answers that were stopped
    answers: dict[int, Rollout] = field(default_factory=dict)  # by sample: ended and graded

    def copy(self) -> OpenGroup:
        """A group that does not change with this one."""
        return replace(self, begun=dict(self.begun), answers=dict(self.answers))

    @property
    def oldest_version(self) -> int | None:
        """Version of the oldest token; None where there is none yet."""
        firsts = [version_spans(answer)[0][0] for answer in self.begun.values()]
        firsts += [rollout.version_spans[0][0] for rollout in self.answers.values()]
        return min(firsts, default=None)

    def close(self) -> RolloutGroup:
        """The group with the answers that it has, as copies."""
        rollouts = [replace(self.answers[sample]) for sample in sorted(self.answers)]
        oldest = self.oldest_version
        return RolloutGroup(self.draw, self.prompt, rollouts, step=1 + (oldest or 0))  # version 0 answers in step 1


class RolloutBuffer:
    """The open groups that this rank owns."""

    def __init__(
        self, groups: Iterable[OpenGroup], config: Config, tokenizer: PreTrainedTokenizerBase, verifier: Verifier
    ) -> None:
        self._config, self._tokenizer, self._verifier = config, tokenizer, verifier
        self._num_samples = config.rollout.answers_per_question
        self._groups = {group.draw: group.copy() for group in sorted(groups, key=lambda group: group.draw)}
        self._grading: list[tuple[OpenGroup, int, GradingAnswer]] = []  # (group, sample, answer)
        self._told: set[int] = set()  # draws of groups that `complete` has handed out
        limit = config.rollout.max_response_tokens
        for group in self._groups.values():
            for sample, answer in list(group.begun.items()):
                if len(answer.token_ids) >= limit:  # begun under a higher limit, before the run went on with this one
                    self.add(group.draw * self._num_samples + sample, cut_off(answer, limit))
        self.take_verdicts(0.0)

    def open(self, draw: int, prompt: Prompt) -> None:
        """Start a question."""
        self._groups[draw] = OpenGroup(draw, prompt)

    def requests(self, draws: Iterable[int] | None = None) -> list[AnswerRequest]:
        """A request for every answer that has not ended, in draw order; of some groups, or of all."""
        groups = [self._groups[draw] for draw in (self._groups if draws is None else draws)]
        return [
            AnswerRequest(
                group.draw * self._num_samples + sample,
                group.prompt.token_ids,
                (self._config.seed, group.draw, sample),
                group.begun.get(sample),
            )
            for group in groups
            for sample in range(self._num_samples)
            if sample not in group.answers and group.draw not in self._told
        ]

    def add(self, number: int, completion: Completion) -> None:
        """Take an answer of a stream: one that has ended is given to the verifier, another one kept as it is."""
        draw, sample = divmod(number, self._num_samples)
        group = self._groups.get(draw)
        if group is None:  # dropped as too old while this was under way
            return
        if completion.finish_reason == "stopped":
            group.begun[sample] = completion
            return
        group.begun.pop(sample, None)
        verifier = None if completion.finish_reason == "length" else self._verifier
        answer = GradingAnswer.begin(completion, group.prompt, self._tokenizer, verifier)
        self._grading.append((group, sample, answer))

    def take_verdicts(self, timeout_s: float | None) -> None:
        """Put answers with a verdict into their groups; wait for the others at most so many seconds, None without a
        limit (graders have limits of their own)."""
        futures = [answer.verdict for _, _, answer in self._grading if answer.verdict is not None]
        wait(futures, timeout_s)
        entries, self._grading = self._grading, []
        for entry in entries:
            group, sample, answer = entry
            if not answer.is_graded:  # asked once: a verdict may come at any moment
                self._grading.append(entry)
                continue
            group.answers[sample] = to_rollout(group.draw, sample, answer.result(), self._config.algorithm.truncated)

    def complete(self) -> list[RolloutGroup]:
        """Groups whose answers are all graded, in draw order; each is handed out once."""
        found = [g for g in self._groups.values() if len(g.answers) == self._num_samples and g.draw not in self._told]
        self._told.update(group.draw for group in found)
        return [group.close() for group in found]

    def too_old(self, version: int) -> list[RolloutGroup]:
        """What there is of the groups that are too old to be trained under weights of `version`, each once; no more
        answers are asked for them."""
        bound = version - self._config.rollout.max_staleness
        old = [g for g in self._groups.values() if (oldest := g.oldest_version) is not None and oldest < bound]
        self._told.update(group.draw for group in old)
        return [group.close() for group in old]

    @property
    def num_tokens(self) -> int:
        """Response tokens that there are."""
        groups = self._groups.values()
        begun = sum(len(answer.token_ids) for group in groups for answer in group.begun.values())
        return begun + sum(len(rollout.response_ids) for group in groups for rollout in group.answers.values())

    def remove(self, draws: Iterable[int]) -> None:
        """Let go of groups that are trained or dropped."""
        for draw in draws:
            self._groups.pop(draw, None)

    def snapshot(self) -> tuple[OpenGroup, ...]:
        """All open groups as they are now, in draw order."""
        return tuple(group.copy() for group in self._groups.values())


def cut_off(answer: Completion, limit: int) -> Completion:
    """The first `limit` tokens of an answer, as one that was cut off at that length."""
    spans = tuple((v, start, min(end, limit)) for v, start, end in answer.weight_version_spans if start < limit)
    return replace(
        answer,
        token_ids=answer.token_ids[:limit],
        logprobs=answer.logprobs[:limit],
        finish_reason="length",
        weight_version_spans=spans,
    )
