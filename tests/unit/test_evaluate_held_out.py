"""Held-out figures of a training run, by hand."""

import json

import numpy as np
import pytest
from tiny import make_tokenizer

from megatron_nft.evaluate.intervals import score_interval
from megatron_nft.train.held_out import load_held_out, summarize_held_out


def write(path, questions):
    rows = [
        {"prompt": [{"role": "user", "content": text}], "reward_model": {"style": "rule", "ground_truth": answer}}
        for text, answer in questions
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def held_out(tmp_path):
    """Two questions twice each in one file, with one that is too long; three in another."""
    copies = write(tmp_path / "aime24.jsonl", [("a", "1"), ("b", "2"), ("x" * 300, "0"), ("a", "1"), ("b", "2")])
    others = write(tmp_path / "math500.jsonl", [("c", "1"), ("d", "1"), ("e", "1")])
    return load_held_out([copies, others], make_tokenizer(), max_prompt_tokens=100)


def test_every_question_knows_its_file_and_keeps_its_number(held_out):
    assert [p.index for p in held_out.prompts] == [0, 1, 3, 4, 5, 6, 7]  # as if the files were one
    assert held_out.benchmarks == ["aime24"] * 4 + ["math500"] * 3


def test_copies_are_one_question_and_benchmarks_count_alike(held_out):
    """aime24: a 1 of 2 right, b 2 of 2; math500: 1, 0, 0 of 1."""
    correct = [0, 1, 1, 1, 1, 0, 0]
    counts = np.array([[p.index, 1, c, 0, 0, 0, 10] for p, c in zip(held_out.prompts, correct)])
    figures = summarize_held_out(counts, held_out)
    assert figures["aime24/accuracy"] == 0.75
    two = score_interval(np.array([0.5, 1.0]))  # two questions, not four
    assert (figures["aime24/accuracy_low"], figures["aime24/accuracy_high"]) == (two.low, two.high)
    assert figures["math500/accuracy"] == pytest.approx(1 / 3)
    assert figures["accuracy"] == pytest.approx((0.75 + 1 / 3) / 2)
    assert figures["length_mean"] == 10


def test_a_single_benchmark_has_no_name(tmp_path):
    path = write(tmp_path / "sums.jsonl", [("c", "1"), ("d", "1")])
    held_out = load_held_out([path], make_tokenizer(), max_prompt_tokens=100)
    figures = summarize_held_out(np.array([[0, 1, 1, 0, 0, 0, 4], [1, 1, 0, 0, 1, 1, 6]]), held_out)
    assert figures["accuracy"] == 0.5
    assert figures["no_verdict_share"] == 0.5
    assert not [name for name in figures if "/" in name]


def test_no_file_is_no_question():
    assert load_held_out([], make_tokenizer(), max_prompt_tokens=100).prompts == []
