"""Drawing the questions that `data.choose` lets through, alike on every rank, and what a run remembers for it.

    checkpoints/step_000020/questions/past.json      {"17": [3, [0.5, 1.0, 1.0]]}: asked three times, and the last rates
    checkpoints/step_000020/questions/ahead.json     [[212, 17, 1.0]]: of draw 212, which counts later (`Memory`)

Only complete steps count: within a step the function sees what was known at its start, and a step that is abandoned
leaves nothing behind.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_nft.data.choice import Choice, ChoiceError, Past, with_rates
from megatron_nft.data.prompts import PromptStream
from megatron_nft.distributed import gather_objects, run_everywhere
from megatron_nft.files import write_atomically
from megatron_nft.types import Prompt, RolloutGroup

Rate = tuple[int, int, float]
"""Draw, `Prompt.index` and correct rate of a group."""


def draw_questions(
    stream: PromptStream, count: int, choice: Choice | None, past: Mapping[int, Past], group: dist.ProcessGroup | None
) -> tuple[list[tuple[int, Prompt]], int]:
    """The next `count` questions to ask, each with its draw, and how many were skipped. Collective with a `choice`.

    ChoiceError, on every rank, where the function fails on one, skips without end or does not say the same on all.
    """
    if choice is None:
        return stream.draw(count), 0
    drawn, skipped = run_everywhere(lambda: choice.draw(stream, count, past), group, ChoiceError)
    _check_same([draw for draw, _ in drawn], choice, group)
    return drawn, skipped


def _check_same(draws: Sequence[int], choice: Choice, group: dist.ProcessGroup | None) -> None:
    if len(set(gather_objects(hash(tuple(draws)), group))) == 1:
        return
    chosen = gather_objects(list(draws), group)
    first = next(i for i, draws in enumerate(zip(*chosen)) if len(set(draws)) > 1)
    raise ChoiceError(
        f"data.choose={choice.name} does not say the same on every rank: asked are draws "
        f"{sorted({draws[first] for draws in chosen})}, of which each rank took one. What it returns may depend on its "
        "argument alone; for a random number it has `chance`"
    )


def rates_of(groups: Sequence[RolloutGroup], fates: Sequence[str]) -> list[Rate]:
    """Of the groups that have all of their answers, of which enough count."""
    both = zip(groups, fates, strict=True)
    return [(g.draw, g.prompt.index, g.correct_rate) for g, fate in both if fate not in ("too_few", "too_old")]


def remember(past: Mapping[int, Past], rates: Iterable[Rate]) -> dict[int, Past]:
    """`past` with the groups of a step, of all ranks and in any order."""
    return with_rates(past, ((index, rate) for _, index, rate in sorted(rates)))


class Memory:
    """What is known of questions where groups are complete in any order (rollout.mode): the same on every rank.

    They count in draw order: after a step, those of all draws up to the last one that it trained. Of these each is
    trained or dropped, so what counts depends on the answers alone, not on when each of them came.
    """

    def __init__(self, past: Mapping[int, Past], ahead: Iterable[Rate]) -> None:
        """past, ahead: see RunState."""
        self.past, self._rates = dict(past), list(ahead)

    def add(self, rates: Iterable[Rate]) -> None:
        """Take note of groups that are complete, each once."""
        self._rates += rates

    def count_up_to(self, draw: int) -> None:
        """Count the groups up to `draw`, the last one that a step trains."""
        self.past = remember(self.past, (rate for rate in self._rates if rate[0] <= draw))
        self._rates = [rate for rate in self._rates if rate[0] > draw]

    def ahead(self, waiting: Container[int]) -> tuple[Rate, ...]:
        """Groups that were dropped and do not count yet. waiting: draws of complete groups that are still kept, which
        are told of again when a run goes on."""
        return tuple(sorted(rate for rate in self._rates if rate[0] not in waiting))


def write_past(checkpoint: Path, past: Mapping[int, Past], ahead: Sequence[Rate]) -> None:
    """Write what is remembered (see RunState) into a checkpoint's folder; nothing where there is none."""
    folder = checkpoint / "questions"
    if past or ahead:
        folder.mkdir()
        stored = {index: [p.asked, p.rates] for index, p in sorted(past.items())}
        write_atomically(folder / "past.json", json.dumps(stored))
    if ahead:
        write_atomically(folder / "ahead.json", json.dumps(ahead))


def read_past(checkpoint: Path) -> tuple[dict[int, Past], tuple[Rate, ...]]:
    """What `write_past` wrote, bit for bit; empty where nothing was."""
    past, ahead = (_read(checkpoint / "questions" / name) for name in ("past.json", "ahead.json"))
    found = {int(index): Past(asked, tuple(rates)) for index, (asked, rates) in dict(past).items()}
    return found, tuple((draw, index, rate) for draw, index, rate in ahead)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else ()
