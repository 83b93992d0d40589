"""Rewards between 0 and 1: from the grader's number to NFT's loss, whose r is then the group's mean reward."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_nft.algorithms import open_algorithm, read_settings
from megatron_nft.config import VerifyConfig
from megatron_nft.data.grouping import classify
from megatron_nft.data.packing import pack
from megatron_nft.data.rollout_file import read_rollout_file, write_rollouts
from megatron_nft.data.sample_file import read_samples, write_samples
from megatron_nft.losses import nft_loss
from megatron_nft.types import Prompt, Rollout, RolloutGroup, Verdict
from megatron_nft.verify import VerifierPool
from megatron_nft.verify.graders import grade_one

REWARDS = (1.0, 0.25, 0.75, 0.0)


def group(*rewards: float | None, tokens: int = 2) -> RolloutGroup:
    prompt = Prompt(0, "src", ({"role": "user", "content": "q"},), "1", np.array([1, 2], np.int32))
    rows = np.full(tokens, -1.0, np.float32)
    rollouts = [
        Rollout(
            5,
            i,
            np.arange(3, 3 + tokens, dtype=np.int32),
            rows,
            "stop",
            0,
            "text",
            verdict=Verdict.CORRECT if (reward or 0) >= 0.5 else Verdict.WRONG,
            reward=reward,
            trainer_logprobs=rows,
        )
        for i, reward in enumerate(rewards)
    ]
    return RolloutGroup(5, prompt, rollouts, step=1)


def test_the_loss_is_the_equation_with_a_reward_in_between():
    rng = np.random.default_rng(0)
    n = 300
    behaviour = torch.from_numpy(-rng.random(n))
    logprobs = (behaviour + torch.from_numpy(0.5 * rng.normal(size=n))).requires_grad_()
    reward, rate = torch.from_numpy(rng.random(n)), torch.from_numpy(0.1 + 0.8 * rng.random(n))
    loss = nft_loss(logprobs, behaviour, reward, rate, negative_weight=0.7, clamp=0.6, prompt_weight="dr_grpo")
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    for d, c, r, value, slope in zip(
        (logprobs - behaviour).tolist(), reward.tolist(), rate.tolist(), loss.tolist(), gradient.tolist()
    ):
        ratio = math.exp(d)
        clamped = max((1 - r * ratio) / (1 - r), 0.6)
        assert value == pytest.approx((1 - r) * (c * -d + 0.7 * (1 - c) * -math.log(clamped)), rel=1e-11, abs=1e-13)
        expected = (1 - r) * (-c + 0.7 * (1 - c) * r * ratio / ((1 - r) * clamped))
        assert slope == pytest.approx(expected, rel=1e-10, abs=1e-13)


def test_on_policy_the_advantage_is_the_distance_from_the_mean_reward():
    algorithm = open_algorithm(read_settings({"name": "nft"}), max_response_tokens=8)
    samples = algorithm.samples(group(*REWARDS))
    assert {s.correct_rate for s in samples} == {0.5}
    batch = pack(samples, range(4))
    logprobs = batch.behaviour_logprobs.clone().requires_grad_()
    algorithm.loss(logprobs, batch).where(batch.loss_mask > 0, 0.0).sum().backward()
    advantages = [-0.5, 0.25, -0.25, 0.5]  # the loss falls where the reward is above the mean
    assert logprobs.grad[batch.loss_mask > 0].tolist() == pytest.approx(np.repeat(advantages, 2).tolist())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"name": "dr_grpo"}, [0.5, -0.25, 0.25, -0.5]),
        ({"name": "w_reinforce"}, [0.1, 0.025 - 0.75, 0.075 - 0.25, -1.0]),
        ({"name": "dapo"}, (np.array([0.5, -0.25, 0.25, -0.5]) / np.std(REWARDS)).tolist()),
    ],
)
def test_policy_gradients_take_the_number_too(settings, expected):
    algorithm = open_algorithm(read_settings(settings), max_response_tokens=8)
    assert [s.advantage for s in algorithm.samples(group(*REWARDS))] == pytest.approx(expected)


def test_rft_leaves_out_answers_without_any_reward():
    algorithm = open_algorithm(read_settings({"name": "rft"}), max_response_tokens=8)
    assert [s.sample_index for s in algorithm.samples(group(*REWARDS))] == [0, 1, 2]


@pytest.mark.parametrize(
    ("rewards", "fate"),
    [((0.6, 0.9), "kept"), ((0.3, 0.1), "kept"), ((0.6, 0.6), "all_correct"), ((0.3, 0.3, 0.3), "all_wrong")],
)
def test_a_group_teaches_where_its_rewards_differ(rewards, fate):
    assert classify(group(*rewards)) == fate


def test_a_grader_gives_a_number(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    with VerifierPool(VerifyConfig(grader="soft_grader.grade")) as pool:
        some, most = (pool.submit(text, "1234").result() for text in ("1", "123"))
    assert (some.reward, some.verdict, most.reward, most.verdict) == (0.25, Verdict.WRONG, 0.75, Verdict.CORRECT)
    assert grade_one("1234", "1234", "soft_grader.grade").reward == 1.0
    refused = grade_one("1", "1", "soft_grader.beyond")
    assert refused.reward is None and "returned 1.5: a grader returns True, False, a float in [0, 1]" in refused.reason


def test_files_keep_it(tmp_path):
    whole = group(0.25, None)
    write_rollouts(tmp_path / "rollouts.parquet", [whole], ["trained"], step=1)
    assert read_rollout_file(tmp_path / "rollouts.parquet", ["reward"])["reward"].to_pylist() == [0.25, None]
    samples = open_algorithm(read_settings({}), max_response_tokens=8).samples(whole)
    write_samples(tmp_path / "samples.parquet", samples)
    assert [s.reward for s in read_samples(tmp_path / "samples.parquet")] == [0.25, None]
