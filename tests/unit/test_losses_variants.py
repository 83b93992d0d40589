"""GSPO, CISPO, W-REINFORCE and GRPO's mean per answer against float64 computations written from their equations."""

import math

import numpy as np
import pytest
import torch

from megatron_nft.algorithms import open_algorithm, read_settings
from megatron_nft.data.packing import pack
from megatron_nft.losses import cispo_loss, gspo_loss
from megatron_nft.types import TrainingSample

LENGTHS = (1, 4, 2, 7, 3, 5)


@pytest.fixture
def answers():
    """Per answer: log-probs and behaviour log-probs [n], advantage. Ratios on both sides of every clip below."""
    rng = np.random.default_rng(4)
    made = []
    for n in LENGTHS:
        behaviour = -2.0 * rng.random(n) - 0.1
        made.append((behaviour + 0.6 * rng.normal(size=n), behaviour, float(rng.normal())))
    return made


def packed(answers):
    """logprobs (with gradient), behaviour, advantage, mask, segments, [T]: a prompt token before each answer."""
    rows = [[], [], [], [], []]
    for segment, (logprobs, behaviour, advantage) in enumerate(answers):
        values = [[0.3, *logprobs], [math.nan, *behaviour], [advantage] * (len(logprobs) + 1)]
        values += [[0.0, *np.ones(len(logprobs))], [segment] * (len(logprobs) + 1)]
        for row, more in zip(rows, values):
            row.extend(more)
    logprobs, behaviour, advantage, mask = (torch.tensor(row, dtype=torch.float64) for row in rows[:4])
    return logprobs.requires_grad_(), behaviour, advantage, mask, torch.tensor(rows[4])


def masked(loss, logprobs, mask):
    """Loss and gradient of its masked sum, at the response tokens."""
    inside = mask > 0
    (gradient,) = torch.autograd.grad(loss.where(inside, 0.0).sum(), logprobs)
    assert gradient[~inside].abs().sum() == 0
    return loss.detach()[inside].numpy(), gradient[inside].numpy()


def test_gspo_equals_its_equation(answers):
    low, high = 0.1, 0.15
    logprobs, behaviour, advantage, mask, segments = packed(answers)
    found = gspo_loss(logprobs, behaviour, advantage, mask, segments, clip_low=low, clip_high=high)
    values, gradient = masked(found, logprobs, mask)
    expected_values, expected_gradient, seen = [], [], set()
    for new, old, a in answers:
        n, s = len(new), math.exp(float(np.mean(new - old)))
        plain, clipped = s * a, min(max(s, 1 - low), 1 + high) * a
        expected_values += [-min(plain, clipped)] * n
        # each of n tokens has the answer's loss, whose derivative by each log-prob is -s A / n where it is not clipped
        expected_gradient += [-plain if plain <= clipped else 0.0] * n
        seen.add((plain <= clipped, a > 0))
    assert len(seen) >= 3
    np.testing.assert_allclose(values, expected_values, rtol=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-12)


def test_on_policy_gspo_is_grpo_with_the_mean_per_answer(answers):
    logprobs, _, advantage, mask, segments = packed(answers)
    _, gradient = masked(gspo_loss(logprobs, logprobs.detach(), advantage, mask, segments), logprobs, mask)
    np.testing.assert_allclose(gradient, np.concatenate([np.full(len(new), -a) for new, _, a in answers]), rtol=1e-12)


def test_cispo_equals_its_equation(answers):
    logprobs, behaviour, advantage, mask, _ = packed(answers)
    behaviour = behaviour.nan_to_num()  # one ratio per token: outside the mask they are of no consequence
    for low, high in ((1.0, 0.5), (0.3, 0.2)):
        found = cispo_loss(logprobs, behaviour, advantage, clip_low=low, clip_high=high)
        values, gradient = masked(found, logprobs, mask)
        new, old = (np.concatenate([a[i] for a in answers]) for i in (0, 1))
        a = np.concatenate([np.full(len(new), a) for new, _, a in answers])
        weight = np.minimum(np.maximum(np.exp(new - old), 1 - low), 1 + high)
        assert (weight == 1 + high).sum() > 2 and ((weight == 1 - low).sum() > 2) == (low < 1)
        np.testing.assert_allclose(values, -weight * a * new, rtol=1e-12)
        np.testing.assert_allclose(gradient, -weight * a, rtol=1e-12)  # no token without a gradient
    with pytest.raises(ValueError, match="clip_high=0"):
        cispo_loss(logprobs, behaviour, advantage, clip_high=0.0)


def sample(index, response, correct, advantage, behaviour):
    ids = np.arange(1, response + 3, dtype=np.int32)
    rows = np.full(response, behaviour, np.float32)
    return TrainingSample(0, index, ids, 2, rows, rows, correct=correct, correct_rate=0.5, advantage=advantage)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "cispo", "w_reinforce", "gspo"])
def test_the_mean_per_answer_divides_by_the_tokens_of_the_answer(name):
    batch = pack([sample(0, 2, True, 1.5, -1.0), sample(1, 5, False, -0.5, -1.0)], [0, 1], multiple_of=13)
    logprobs = torch.full_like(batch.loss_mask, -1.0)
    total, mean = (
        open_algorithm(
            read_settings({"name": name, "answer_loss": kind, "loss_divisor": 1}), max_response_tokens=8
        ).loss(logprobs, batch)[batch.loss_mask > 0]
        for kind in ("sum", "mean")
    )
    assert total.abs().min() > 0
    torch.testing.assert_close(mean, total / torch.tensor([2.0] * 2 + [5.0] * 5))


def test_w_reinforce_on_policy_is_the_weighted_policy_gradient():
    algorithm = open_algorithm(read_settings({"name": "w_reinforce"}), max_response_tokens=8)
    batch = pack([sample(0, 2, True, 0.1, -1.0), sample(1, 3, False, -1.0, -1.0)], [0, 1])
    logprobs = torch.full_like(batch.loss_mask, -1.0).requires_grad_()
    algorithm.loss(logprobs, batch).where(batch.loss_mask > 0, 0.0).sum().backward()
    assert logprobs.grad[batch.loss_mask > 0].tolist() == pytest.approx([-0.1] * 2 + [1.0] * 3)
