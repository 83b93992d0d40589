r"""The grid's second task, on which many answers are right.

    question  ?+?-47=61
    answer    108=\boxed{50+58}      any two numbers from 10 to 99 whose sum is 108

The first task is the quick start's. Text is tokenised as there.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_nft.data.synthetic import BOXED

DATA_SOURCE = "pairs"
_BOX = re.compile(r"\\boxed\{([1-9]\d)\+([1-9]\d)\}\s*\Z")


@dataclass(frozen=True, slots=True)
class Pair:
    """x + y - z with x and y asked for; those given here are one answer of many."""

    x: int
    y: int
    z: int

    @property
    def question(self) -> str:
        """The prompt."""
        return f"?+?-{self.z}={self.x + self.y - self.z}"

    @property
    def answer(self) -> str:
        """The reference answer: what the two numbers add up to."""
        return str(self.x + self.y)

    @property
    def solution(self) -> str:
        """A response that the supervised warm-up learns, without the end token."""
        return f"{self.x + self.y}={BOXED}{self.x}+{self.y}}}"


def pairs(num: int, seed: int = 0) -> list[Pair]:
    """Draw `num` different questions, in random order, with two numbers each. ValueError above the 16,110 there are."""
    rng = random.Random(seed)
    asked = [(total, z) for total in range(20, 199) for z in range(10, 100)]
    if not 0 < num <= len(asked):
        raise ValueError(f"{num} questions: there are 1 to {len(asked)} different ones")
    found = []
    for total, z in rng.sample(asked, num):
        x = rng.randint(max(10, total - 99), min(99, total - 10))
        found.append(Pair(x, total - x, z))
    return found


def is_right(response: str, answer: str) -> bool:
    """Whether a response ends in a box with two numbers from 10 to 99 that add up to `answer`."""
    box = _BOX.search(response)
    return box is not None and int(box[1]) + int(box[2]) == int(answer)


def grade(response: str, answer: str, data_source: str, extra: dict[str, Any] | None) -> bool:
    """The grader, as `verify.grader=grid_tasks.grade`."""
    return is_right(response, answer)


def write_pairs(folder: Path, num_train: int, num_held_out: int) -> None:
    """Write folder/train.jsonl and folder/held_out.jsonl, which share no question."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = pairs(num_train + num_held_out)
    for name, part in (("held_out", drawn[:num_held_out]), ("train", drawn[num_held_out:])):
        rows = [{"data_source": DATA_SOURCE, "prompt": p.question, "answer": p.answer} for p in part]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
