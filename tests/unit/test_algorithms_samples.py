"""Which groups of answers are trained, and as what samples."""

import numpy as np
import pytest

from megatron_nft.algorithms import open_algorithm, read_settings
from megatron_nft.data.grouping import classify
from megatron_nft.types import Prompt, Rollout, RolloutGroup, Verdict


def rollout(index, verdict, tokens=3, ignored=False, trained=True):
    return Rollout(
        draw=5,
        sample_index=index,
        response_ids=np.arange(10, 10 + tokens, dtype=np.int32),
        rollout_logprobs=np.full(tokens, -1.0 - index, np.float32),
        finish_reason="stop",
        weight_version=3,
        text="",
        verdict=verdict,
        ignored=ignored,
        trainer_logprobs=np.full(tokens, -2.0 - index, np.float32) if trained else None,
    )


def group(*rollouts):
    prompt = Prompt(7, "src", ({"role": "user", "content": "q"},), "1", np.array([1, 2], np.int32))
    return RolloutGroup(5, prompt, list(rollouts), step=4)


def samples_of(group, max_response_tokens=100, **settings):
    return open_algorithm(read_settings(settings), max_response_tokens=max_response_tokens).samples(group)


R, W, U, T = Verdict.CORRECT, Verdict.WRONG, Verdict.UNPARSEABLE, Verdict.TIMEOUT


@pytest.mark.parametrize(
    ("verdicts", "ignored", "expected"),
    [
        ((R, W, W), (), "kept"),
        ((R, R, R), (), "all_correct"),
        ((W, U, T), (), "all_wrong"),  # neither an unparseable answer nor a timeout is a positive
        ((R, U), (), "kept"),
        ((R, W, W), (0,), "all_wrong"),
        ((R, R, W), (2,), "all_correct"),
        ((R, W, W), (1, 2), "too_few"),
        ((R, W), (0, 1), "too_few"),
    ],
)
def test_classify(verdicts, ignored, expected):
    assert classify(group(*(rollout(i, v, ignored=i in ignored) for i, v in enumerate(verdicts)))) == expected


def test_samples_carry_the_answers_and_the_rate():
    g = group(rollout(0, R), rollout(1, W, tokens=5), rollout(2, W, ignored=True), rollout(3, U, trained=False))
    samples = samples_of(g)
    assert [s.sample_index for s in samples] == [0, 1, 3]
    assert [s.correct for s in samples] == [True, False, False]
    assert {s.correct_rate for s in samples} == {1 / 3}  # the ignored answer does not count
    first = samples[1]
    assert first.input_ids.tolist() == [1, 2, 10, 11, 12, 13, 14] and first.input_ids.dtype == np.int32
    assert (first.prompt_length, first.response_length, first.draw, first.step) == (2, 5, 5, 4)
    assert first.rollout_logprobs.tolist() == [-2.0] * 5 and first.behaviour_logprobs.tolist() == [-3.0] * 5
    assert samples[2].behaviour_logprobs is None


def test_rate_is_clamped_for_the_loss_only():
    g = group(rollout(0, R), *(rollout(i, W) for i in range(1, 100)))
    assert samples_of(g)[0].correct_rate == 0.02
    assert samples_of(g, correct_rate_min=0.005)[0].correct_rate == 0.01
    # advantages: true rate 0.01, (1 - 0.01) / sqrt(0.01 * 0.99)
    assert samples_of(g, name="grpo")[0].advantage == pytest.approx(9.9498743710662)
    flipped = group(rollout(0, W), *(rollout(i, R) for i in range(1, 100)))
    assert samples_of(flipped)[0].correct_rate == 0.98


@pytest.mark.parametrize("settings", [{"name": "rft"}, {"negative_weight": 0.0}])
def test_without_a_negative_term_wrong_answers_are_left_out(settings):
    g = group(rollout(0, R), rollout(1, W), rollout(2, R), rollout(3, W))
    samples = samples_of(g, **settings)
    assert [s.sample_index for s in samples] == [0, 2]
    assert samples[0].correct_rate == 0.5  # but they count in the rate


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nft", [0, 0, 0, 0]),
        ("dr_grpo", [0.75, -0.25, -0.25, -0.25]),
        ("grpo", [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)]),
        ("dapo", [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)]),
        ("gspo", [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)]),
        ("cispo", [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)]),
        ("w_reinforce", [0.1, -1, -1, -1]),
    ],
)
def test_advantages(name, expected):
    g = group(rollout(0, R), rollout(1, W), rollout(2, U), rollout(3, T))
    assert [s.advantage for s in samples_of(g, name=name)] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "cispo"])
def test_the_standard_deviation_is_chosen_by_name(name):
    g = group(rollout(0, R), rollout(1, W), rollout(2, W), rollout(3, W))
    # squares 9/16 + 3/16 over K - 1 = 3: std 1/2 of the rewards 1, 0, 0, 0
    assert [s.advantage for s in samples_of(g, name=name, deviation="sample")] == pytest.approx([1.5, -0.5, -0.5, -0.5])


def test_the_weight_of_right_answers_in_w_reinforce():
    g = group(rollout(0, R), rollout(1, W))
    assert [s.advantage for s in samples_of(g, name="w_reinforce", positive_weight=0.0)] == [0.0, -1.0]
    assert [s.advantage for s in samples_of(g, name="w_reinforce", positive_weight=1.0)] == [1.0, -1.0]


def test_dapo_penalty_for_long_answers():
    # limit 20, buffer 8: nothing up to 12 tokens, half the penalty at 16, all of it at 20
    settings = {"name": "dapo", "overlong_buffer_tokens": 8, "overlong_penalty": 1.0}
    g = group(rollout(0, R, 12), rollout(1, R, 16), rollout(2, R, 20), rollout(3, W, 12))
    rewards = np.array([1.0, 0.5, 0.0, -1.0])
    expected = (rewards - rewards.mean()) / rewards.std()
    assert [s.advantage for s in samples_of(g, 20, **settings)] == pytest.approx(expected.tolist())
    rewards = np.array([1.0, 0.75, 0.5, -1.0])
    expected = (rewards - rewards.mean()) / rewards.std()
    assert [s.advantage for s in samples_of(g, 20, **settings | {"overlong_penalty": 0.5})] == pytest.approx(
        expected.tolist()
    )
    assert [s.correct for s in samples_of(g, 20, **settings)] == [True, True, True, False]
