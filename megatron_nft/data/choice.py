"""Which drawn questions are asked: a function may skip some, from how they were answered before (`data.choose`).

The function gets a `Drawn` and returns True to ask the question or False to skip it. What it says may depend on its
argument alone, so that every rank says the same and a resumed run goes on as if it had never stopped. A function that
wants a random number takes `Drawn.chance`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from megatron_nft.data.prompts import PromptStream
from megatron_nft.types import Prompt
from megatron_nft.verify.graders import load_function

KEPT_RATES = 4
MOST_SKIPPED_PASSES, FEWEST_TRIED = 10, 1000
"""A run ends when so many passes over all questions, and at least so many draws, were skipped in a row."""
SKIP_SOLVED = "skip_solved"
SKIP_PROBABILITY = 0.75
_STREAM = 7  # sets these random numbers apart from others that follow from (seed, draw)


class ChoiceError(ValueError):
    """`data.choose` cannot be loaded, failed, or skips everything; the message names function, draw and question."""


@dataclass(frozen=True, slots=True)
class Past:
    """How a question was answered until the last complete step."""

    asked: int = 0  # groups that gave a rate
    rates: tuple[float, ...] = ()  # correct rates of the last KEPT_RATES of them, in [0, 1], newest last

    def with_rate(self, rate: float) -> Past:
        """After one more group, of this correct rate in [0, 1]."""
        return Past(self.asked + 1, (*self.rates, rate)[-KEPT_RATES:])


@dataclass(frozen=True, slots=True)
class Drawn:
    """A drawn question, as the function sees it."""

    draw: int  # running number in the stream of questions
    prompt: Prompt
    past: Past
    chance: float  # in [0, 1), drawn at (seed, draw)


def skip_solved(question: Drawn, probability: float = SKIP_PROBABILITY) -> bool:
    """A question whose last two groups were all right is skipped with `probability`; all others are asked."""
    last = question.past.rates[-2:]
    solved = len(last) == 2 and min(last) >= 1.0
    return not solved or question.chance >= probability


@dataclass(frozen=True)
class Choice:
    """`data.choose`, loaded."""

    name: str
    function: Callable[[Drawn], object]
    seed: int

    def draw(self, stream: PromptStream, count: int, past: Mapping[int, Past]) -> tuple[list[tuple[int, Prompt]], int]:
        """The next `count` questions that the function does not skip, each with its draw, and how many it skipped on
        the way; the stream's cursor moves past both.

        past: by `Prompt.index`. ChoiceError where the function fails or skips without end.
        """
        chosen: list[tuple[int, Prompt]] = []
        most = max(FEWEST_TRIED, MOST_SKIPPED_PASSES * stream.num_prompts)
        skipped = in_a_row = 0
        while len(chosen) < count:
            [(draw, prompt)] = stream.draw(1)
            if self._asks(draw, prompt, past.get(prompt.index, Past())):
                chosen.append((draw, prompt))
                in_a_row = 0
                continue
            skipped, in_a_row = skipped + 1, in_a_row + 1
            if in_a_row == most:
                raise ChoiceError(
                    f"data.choose={self.name} skipped {most} draws in a row, the last of them draw {draw} (question "
                    f"{prompt.index}) of {stream.num_prompts} questions: nothing is left to ask. Let it skip fewer, or "
                    "train on other questions (data.train)"
                )
        return chosen, skipped

    def _asks(self, draw: int, prompt: Prompt, past: Past) -> bool:
        chance = float(np.random.default_rng([self.seed, draw, _STREAM]).random())
        where = f"data.choose={self.name}, at draw {draw} (question {prompt.index} of {prompt.data_source})"
        try:
            said = self.function(Drawn(draw, prompt, past, chance))
        except Exception as error:  # a function of the user's may fail in any way
            raise ChoiceError(f"{where}: {type(error).__name__}: {error}") from error
        if not isinstance(said, bool | np.bool_):
            raise ChoiceError(f"{where} returned {said!r:.100}: True asks the question, False skips it")
        return bool(said)


def with_rates(past: Mapping[int, Past], rates: Iterable[tuple[int, float]]) -> dict[int, Past]:
    """`past` and what came after it: (`Prompt.index`, correct rate) of groups, in the order of their draws."""
    later = dict(past)
    for index, rate in rates:
        later[index] = later.get(index, Past()).with_rate(rate)
    return later


def load_choice(name: str, seed: int) -> Choice:
    """The choice that `data.choose` names. ChoiceError says what is missing."""
    kind, colon, number = name.partition(":")
    if kind != SKIP_SOLVED:
        if "." not in name:
            raise ChoiceError(f"data.choose={name}: use {SKIP_SOLVED}, {SKIP_SOLVED}:PROBABILITY or module.function")
        return Choice(name, load_function(name, f"data.choose={name}", ChoiceError), seed)
    try:
        probability = float(number) if colon else SKIP_PROBABILITY
    except ValueError:
        probability = -1.0
    if not 0 < probability < 1:
        raise ChoiceError(f"data.choose={name}: the probability must be a number between 0 and 1, not {number!r}")
    return Choice(name, partial(skip_solved, probability=probability), seed)
