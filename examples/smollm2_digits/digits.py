"""Makes the questions: a number in words, to be written in digits.

    python examples/smollm2_digits/digits.py OUT

    Write the number six hundred and seven in digits    607

Before each question stand four of its length with their answers, as turns of the conversation. OUT gets
train.jsonl (596 numbers of three digits and 1788 of four), held_out/three_digits.jsonl (300) and
held_out/four_digits.jsonl (900); no number stands in two of them, or in one and among the four.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHOTS = {3: (369, 802, 540, 714), 4: (4127, 9060, 2583, 6815)}
HELD_OUT = {3: 300, 4: 900}
TRAIN = {3: 596, 4: 1788}
NAMES = {3: "three_digits", 4: "four_digits"}

ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEENS = ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def in_words(number: int) -> str:
    """Write a number below 10,000 in words: 1042 is "one thousand and forty-two". ValueError for others."""
    if not 0 <= number < 10_000:
        raise ValueError(f"{number}: only numbers from 0 to 9999 have words here")
    if number < 20:
        return [*ONES, *TEENS][number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    many, rest = divmod(number, size)
    if not rest:
        return f"{ONES[many]} {name}"
    return f"{ONES[many]} {name} {'and ' if rest < 100 else ''}{in_words(rest)}"


def question(number: int) -> list[dict[str, str]]:
    """The conversation that asks for a number: four others of its length with their answers, then itself."""
    turns = []
    for shot in SHOTS[len(str(number))]:
        turns += [_ask(shot), {"role": "assistant", "content": str(shot)}]
    return [*turns, _ask(number)]


def _ask(number: int) -> dict[str, str]:
    return {"role": "user", "content": f"Write the number {in_words(number)} in digits"}


def split() -> tuple[list[int], dict[int, list[int]]]:
    """The numbers that are trained, mixed, and those held out by their length. Always the same."""
    train, held_out = [], {}
    for length, shots in SHOTS.items():
        numbers = [n for n in range(10 ** (length - 1), 10**length) if n not in shots]
        random.Random(length).shuffle(numbers)
        held_out[length] = numbers[: HELD_OUT[length]]
        train += numbers[HELD_OUT[length] :][: TRAIN[length]]
    random.Random(0).shuffle(train)
    return train, held_out


def write_task(folder: Path) -> None:
    """Write train.jsonl and held_out/*.jsonl into `folder`."""
    train, held_out = split()
    (folder / "held_out").mkdir(parents=True, exist_ok=True)
    _write(folder / "train.jsonl", train)
    for length, numbers in held_out.items():
        _write(folder / "held_out" / f"{NAMES[length]}.jsonl", numbers)


def _write(path: Path, numbers: Sequence[int]) -> None:
    rows: list[dict[str, Any]] = [
        {"data_source": NAMES[len(str(n))], "prompt": question(n), "answer": str(n)} for n in numbers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    folder = parser.parse_args().out
    write_task(folder)
    print(f"the questions are in {folder}")


if __name__ == "__main__":
    main()
