"""R against a reference policy other than the one that drew the answers: what it means, in float64 and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_nft.algorithms import read_settings
from megatron_nft.algorithms.nft import negative_argument
from megatron_nft.config import Config
from megatron_nft.losses import nft_loss
from megatron_nft.train.correction import corrected
from megatron_nft.types import TrainingSample

EMA = {"reference": "ema"}


def gradient(ratio: float, rate: float, *, correct: bool, **options: float) -> float:
    """d loss / d log pi of one token whose ratio to the reference is `ratio`, without omega."""
    logprob = torch.tensor([-2.0], dtype=torch.float64, requires_grad=True)
    reference = logprob.detach() - np.log(ratio)
    verdict, r = (torch.tensor([x], dtype=torch.float64) for x in (float(correct), rate))
    loss = nft_loss(logprob, reference, verdict, r, prompt_weight="uniform", **options)
    return float(torch.autograd.grad(loss.sum(), logprob)[0])


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_right_answers_have_one_gradient_whatever_the_reference(rate):
    assert {gradient(ratio, rate, correct=True) for ratio in (0.01, 0.5, 1.0, 3.0, 100.0)} == {-1.0}


@pytest.mark.parametrize(
    ("ratio", "rate", "clamp", "expected"),
    [
        (0.5, 0.5, 1.0, 1 / 3),  # (1 - 0.25) / 0.5 = 1.5;  0.25 / (0.5 * 1.5)
        (1.0, 0.5, 1.0, 1.0),
        (2.0, 0.5, 1.0, 2.0),  # (1 - 1) / 0.5 = 0, at the clamp
        (2.0, 0.25, 0.5, 1.0),  # (1 - 0.5) / 0.75 = 2 / 3;  0.5 / (0.75 * 2 / 3)
        (0.5, 0.25, 0.5, 1 / 7),  # (1 - 0.125) / 0.75;  0.125 / 0.875
    ],
)
def test_wrong_answers_are_held_where_the_reference_has_them(ratio, rate, clamp, expected):
    """The formula and the examples of docs/nft.md: pushed down less where they have become less likely already."""
    assert gradient(ratio, rate, correct=False, clamp=clamp) == pytest.approx(expected, rel=1e-12)


def test_the_implicit_negative_policy_needs_the_references_own_rate():
    """Seven arms, two of them right. Its own rate makes the mixture exact; another puts the push off by the odds."""
    reference = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).softmax(0)
    right = torch.tensor([1.0, 0, 0, 1, 0, 0, 0], dtype=torch.float64)
    rate = (reference * right).sum()
    positive, negative = reference * right / rate, reference * (1 - right) / (1 - rate)
    log_ratio = (positive / reference).clamp(min=1e-300).log()
    exact = negative_argument(log_ratio, rate.expand(7))
    np.testing.assert_allclose(exact * reference, negative, rtol=1e-12, atol=1e-12)
    other = 0.6
    assert not np.allclose(negative_argument(log_ratio, torch.full((7,), other)) * reference, negative, rtol=0.05)
    push = gradient(1.0, other, correct=False) / gradient(1.0, float(rate), correct=False)
    odds = other / (1 - other) / (float(rate) / (1 - float(rate)))
    assert push == pytest.approx(odds, rel=1e-12) and odds > 1


def test_the_loss_takes_the_reference_and_the_correction_does_not():
    engine, trainer, reference = (np.array(x, np.float32) for x in ([-2, -2], [-3, -1.5], [-2.5, -4]))
    ids = np.arange(4, dtype=np.int32)
    given = TrainingSample(3, 1, ids, 2, engine, trainer, False, 0.5, reference_logprobs=reference)
    (taken,) = corrected([given], read_settings({**EMA, "correction": "truncate", "correction_high": None}))
    assert taken.behaviour_logprobs is reference
    np.testing.assert_allclose(taken.weights, np.exp([-1.0, 0.5]), rtol=1e-6)
    given.reference_logprobs = None
    assert corrected([given], read_settings({}))[0].behaviour_logprobs is trainer


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({**EMA, "behaviour": "engine"}, "reference=ema and behaviour=engine both say"),
        ({**EMA, "negative_weight": 0}, "negative_weight=0 does not train them"),
        ({**EMA, "reference_decay": 1.0}, "reference_decay"),
        ({**EMA, "name": "rft"}, "reference"),
        ({**EMA, "name": "grpo"}, "reference"),
    ],
)
def test_algorithms_that_refuse_it(settings, said):
    with pytest.raises(ValueError, match=said):
        read_settings(settings)


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ({"fp8": {"recipe": "delayed"}}, "policy.fp8.recipe=delayed"),
        ({"optimizer_offload": True}, "policy.optimizer_offload=true"),
    ],
)
def test_policies_that_refuse_it(policy, said):
    settings = {"run_dir": "r", "model": {"path": "m"}, "data": {"train": ["t"]}, "policy": policy}
    Config.model_validate(settings)
    with pytest.raises(ValueError, match=f"algorithm.reference=ema does not go with {said}"):
        Config.model_validate(settings | {"algorithm": EMA})


def test_only_an_average_has_a_decay():
    assert read_settings({}).average_decay is None and read_settings({"name": "grpo"}).average_decay is None
    assert read_settings(EMA).average_decay == 0.9
    assert read_settings({**EMA, "reference_decay": 0}).average_decay == 0
