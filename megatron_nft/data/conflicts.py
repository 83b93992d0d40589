"""Copies of a question that have different answers: at most one of them can be right."""

from __future__ import annotations

import argparse
from collections.abc import Hashable, Iterable
from typing import Literal, get_args

from megatron_nft.data.rows import DataError

OnConflict = Literal["refuse", "drop", "majority"]

MAX_SHOWN = 10  # questions, and rows of one answer, that an error lists


def add_conflicts_option(parser: argparse.ArgumentParser) -> None:
    """Add `--conflicts` to a command that reads question files."""
    parser.add_argument(
        "--conflicts",
        choices=get_args(OnConflict),
        default="refuse",
        help="questions whose copies have different answers: refuse the file, drop the question, or keep the answer of "
        "most copies (default: refuse)",
    )


class Copies:
    """Where each question is in the data, by answer: question -> answer -> places, all in the order in which they came.

    Answers are compared as text, without the spaces around them.
    """

    def __init__(self) -> None:
        self._places: dict[Hashable, dict[str, list[str]]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def add(self, question: Hashable, answer: str, place: str) -> bool:
        """Note a copy; return whether it is the first of this question with this answer."""
        places = self._places.setdefault(question, {}).setdefault(answer.strip(), [])
        places.append(place)
        return len(places) == 1

    def chosen(self, question: Hashable, on_conflict: OnConflict) -> str | None:
        """Return the answer to go by: the only one, that of most copies with `majority`, None where there is none."""
        answers = self._places[question]
        if len(answers) == 1:
            return next(iter(answers))
        if on_conflict != "majority":
            return None
        first, second = sorted(answers, key=lambda answer: -len(answers[answer]))[:2]
        return first if len(answers[first]) > len(answers[second]) else None

    def counts(self, question: Hashable) -> dict[str, int]:
        """Return how many copies give each answer."""
        return {answer: len(places) for answer, places in self._places[question].items()}

    def conflicts(self) -> list[Hashable]:
        """Return the questions with more than one answer."""
        return [question for question, answers in self._places.items() if len(answers) > 1]

    def refuse(self, hint: str) -> None:
        """DataError that lists every answer of such questions with its places; nothing where there is none."""
        found = self.conflicts()
        if not found:
            return
        listed = [
            " but ".join(f"{answer!r:.80} at {_list(places)}" for answer, places in self._places[question].items())
            for question in found[:MAX_SHOWN]
        ]
        more = f"; and {len(found) - MAX_SHOWN} more questions" if len(found) > MAX_SHOWN else ""
        raise DataError(
            f"{len(found)} question{'s have' if len(found) > 1 else ' has'} copies with different answers: "
            f"{'; '.join(listed)}{more}. {hint}"
        )


def refuse_conflicts(copies: Iterable[tuple[Hashable, str, str]]) -> None:
    """DataError where copies of a question have different answers, given (question, answer, file and row)."""
    found = Copies()
    for question, answer, place in copies:
        found.add(question, answer, place)
    found.refuse("Keep the right one; `megatron-nft prepare` has --conflicts drop and --conflicts majority")


def _list(places: list[str]) -> str:
    more = f" and {len(places) - MAX_SHOWN} more" if len(places) > MAX_SHOWN else ""
    return ", ".join(places[:MAX_SHOWN]) + more
