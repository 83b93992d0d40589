"""The loss that the settings name, over packed micro-batches, and what it reports."""

import math

import numpy as np
import pytest
import torch

from megatron_nft.config import AlgorithmConfig
from megatron_nft.data.packing import filler, pack
from megatron_nft.losses import make_loss, nft_loss, nft_sequence_loss, policy_gradient_loss, rft_loss
from megatron_nft.types import TrainingSample


def sample(prompt, response, correct, rate, advantage=0.0, behaviour=-1.0):
    return TrainingSample(
        draw=0,
        sample_index=0,
        input_ids=np.arange(1, prompt + response + 1, dtype=np.int32),
        prompt_length=prompt,
        rollout_logprobs=np.full(response, -1.1, np.float32),
        behaviour_logprobs=None if behaviour is None else np.full(response, behaviour, np.float32),
        correct=correct,
        correct_rate=rate,
        advantage=advantage,
    )


@pytest.fixture
def batch():
    """3 + 5 response tokens, then 4 tokens of padding. Ratio 2 on the right answer, 2 and 1/2 on the wrong one."""
    return pack([sample(2, 3, True, 0.25, 1.5), sample(3, 5, False, 0.5, -0.5)], [0, 1], multiple_of=17)


@pytest.fixture
def logprobs(batch):
    ratio = torch.ones_like(batch.loss_mask)
    ratio[1:4] = 2.0
    ratio[7:12] = torch.tensor([2.0, 0.5, 0.5, 1.0, 1.0])
    return (ratio.log() - 1.0).requires_grad_()


@pytest.mark.parametrize(
    ("settings", "direct"),
    [
        (
            {"name": "nft", "negative_weight": 0.5, "clamp": 0.7, "prompt_weight": "grpo"},
            lambda lp, b: nft_loss(
                lp,
                b.behaviour_logprobs,
                b.correct,
                b.correct_rate,
                negative_weight=0.5,
                clamp=0.7,
                prompt_weight="grpo",
            ),
        ),
        ({"name": "rft"}, lambda lp, b: rft_loss(lp, b.behaviour_logprobs, b.correct, b.correct_rate)),
        (
            {"name": "nft", "ratio": "sequence", "ratio_max_log": 1.0},
            lambda lp, b: nft_sequence_loss(
                lp, b.behaviour_logprobs, b.correct, b.correct_rate, b.loss_mask, b.segment_ids, ratio_max_log=1.0
            ),
        ),
        (
            {"name": "dapo", "clip_low": 0.1, "clip_high": 0.28},
            lambda lp, b: policy_gradient_loss(lp, b.behaviour_logprobs, b.advantage, clip_low=0.1, clip_high=0.28),
        ),
        ({"name": "grpo"}, lambda lp, b: policy_gradient_loss(lp, b.behaviour_logprobs, b.advantage)),
        (
            {"name": "dr_grpo", "clip_low": 0.3},
            lambda lp, b: policy_gradient_loss(lp, b.behaviour_logprobs, b.advantage, clip_low=0.3),
        ),
    ],
    ids=lambda x: x["name"] if isinstance(x, dict) else "",
)
def test_settings_reach_the_loss(settings, direct, batch, logprobs):
    loss, _ = make_loss(AlgorithmConfig(**settings))(logprobs, batch)
    expected = direct(logprobs, batch) * batch.loss_mask
    assert expected.abs().sum() > 0.1
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    assert gradient[batch.loss_mask == 0].abs().sum() == 0


def test_diagnostics_by_hand(batch, logprobs):
    loss, metrics = make_loss(AlgorithmConfig(prompt_weight="uniform"))(logprobs, batch)
    ln2 = math.log(2)
    # wrong, r = 1/2: x = 2 - R is 0 (clamped), 1.5, 1.5, 1, 1: loss -log of 1, 1.5, 1.5, 1, 1
    expected = {
        "tokens": 8,
        "positive_tokens": 3,
        "negative_tokens": 5,
        "positive_loss": -3 * ln2,
        "negative_loss": -2 * math.log(1.5),
        "ratio": 6 + 2 + 0.5 + 0.5 + 1 + 1,
        "log_ratio": 3 * ln2 + ln2 - 2 * ln2,
        "kl": (6 + 2 + 0.5 + 0.5 + 1 + 1) - 8 - 2 * ln2,
        "max_ratio": 2.0,
        "max_inverse_ratio": 2.0,
        "clamped_tokens": 1,
    }
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx(expected, rel=1e-5)
    assert loss.sum().item() == pytest.approx(-3 * ln2 - 2 * math.log(1.5), rel=1e-5)
    assert all(not v.requires_grad and v.shape == () and v.dtype == torch.float32 for v in metrics.values())


def test_a_filler_carries_no_loss_and_no_counts():
    for name in ("nft", "rft", "grpo", "dr_grpo", "dapo"):
        logprobs = torch.full((8,), -3.0, requires_grad=True)
        loss, metrics = make_loss(AlgorithmConfig(name=name))(logprobs, filler(8))
        loss.sum().backward()
        assert loss.tolist() == [0.0] * 8 and logprobs.grad.abs().sum() == 0
        assert all(v.item() == 0.0 for v in metrics.values())


@pytest.mark.parametrize("settings", [{"name": "nft"}, {"name": "nft", "ratio": "sequence"}, {"name": "grpo"}])
def test_samples_without_behaviour_logprobs_cannot_pass(settings):
    batch = pack([sample(2, 3, True, 0.5, 1.0, behaviour=None)], [0])
    loss, _ = make_loss(AlgorithmConfig(**settings))(torch.full((5,), -1.0), batch)
    assert torch.isnan(loss.sum())


def test_an_enormous_ratio_stays_finite_in_the_log():
    batch = pack([sample(1, 2, False, 0.5, behaviour=-200.0)], [0])
    loss, metrics = make_loss(AlgorithmConfig())(torch.full((3,), -0.5), batch)
    assert torch.isfinite(loss).all()
    assert all(torch.isfinite(v) for v in metrics.values())
    assert metrics["max_ratio"] > 1e30
