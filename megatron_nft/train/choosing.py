"""Drawing the questions that `data.choose` lets through, alike on every rank, and what a run remembers for it.

    checkpoints/step_000020/questions/past.json      {"17": [3, [0.5, 1.0, 1.0]]}: asked three times, and the last rates

Only complete steps count: within a step the function sees what was known at its start, and a step that is abandoned
leaves nothing behind.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

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
    """Of the groups of which enough answers count."""
    both = zip(groups, fates, strict=True)
    return [(g.draw, g.prompt.index, g.correct_rate) for g, fate in both if fate != "too_few"]


def remember(past: Mapping[int, Past], rates: Iterable[Rate]) -> dict[int, Past]:
    """`past` with the groups of a step, of all ranks and in any order."""
    return with_rates(past, ((index, rate) for _, index, rate in sorted(rates)))


def write_past(checkpoint: Path, past: Mapping[int, Past]) -> None:
    """Write `past` into a checkpoint's folder; nothing where there is none."""
    if past:
        path = checkpoint / "questions" / "past.json"
        path.parent.mkdir()
        write_atomically(path, json.dumps({index: [p.asked, p.rates] for index, p in sorted(past.items())}))


def read_past(checkpoint: Path) -> dict[int, Past]:
    """What `write_past` wrote, bit for bit; empty where nothing was."""
    path = checkpoint / "questions" / "past.json"
    if not path.exists():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    return {int(index): Past(asked, tuple(rates)) for index, (asked, rates) in stored.items()}
