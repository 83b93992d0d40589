"""The questions of examples/smollm2_digits."""

import json

import digits
import pytest


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (99, "ninety-nine"),
        (100, "one hundred"),
        (101, "one hundred and one"),
        (969, "nine hundred and sixty-nine"),
        (1000, "one thousand"),
        (1042, "one thousand and forty-two"),
        (2300, "two thousand three hundred"),
        (9815, "nine thousand eight hundred and fifteen"),
    ],
)
def test_words(number, words):
    assert digits.in_words(number) == words


@pytest.mark.parametrize("number", [-1, 10_000])
def test_other_numbers_have_no_words(number):
    with pytest.raises(ValueError, match="0 to 9999"):
        digits.in_words(number)


def test_files(tmp_path):
    digits.write_task(tmp_path)
    files = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "held_out/three_digits", "held_out/four_digits")
    }
    assert {name: len(rows) for name, rows in files.items()} == {
        "train": 2384,
        "held_out/three_digits": 300,
        "held_out/four_digits": 900,
    }
    asked = [row["answer"] for rows in files.values() for row in rows]
    shots = {m["content"] for rows in files.values() for r in rows for m in r["prompt"] if m["role"] == "assistant"}
    assert len({*asked, *shots}) == len(asked) + len(shots)  # none twice, none among the shots
    assert len(shots) == 8
    for row in files["train"]:
        *turns, last = row["prompt"]
        assert [len(m["content"]) for m in turns[1::2]] == [len(row["answer"])] * 4
        assert last == {"role": "user", "content": f"Write the number {digits.in_words(int(row['answer']))} in digits"}
