"""NFT and RFT against a float64 reference written from the equation, one token at a time."""

import math

import numpy as np
import pytest
import torch

from megatron_nft.losses import nft_loss, nft_sequence_loss, rft_loss

CASES = [
    {"negative_weight": w, "clamp": eps, "prompt_weight": omega, "ratio_max_log": cap}
    for w in (0.0, 0.5, 1.0)
    for eps in (0.5, 1.0, 1.3)
    for omega in ("uniform", "dr_grpo", "grpo")
    for cap in (0.7, 10.0)
]


def reference(log_ratio, correct, rate, *, negative_weight, clamp, prompt_weight, ratio_max_log):
    """(loss, d loss / d log-prob) of one token or answer, from the equation.

    Straight-through: d/dR of -log max_v(x, eps) is -(dx/dR) / max(x, eps), with x = (1 - r R) / (1 - r).
    """
    omega = {"uniform": 1.0, "dr_grpo": 1.0 - rate, "grpo": math.sqrt((1.0 - rate) / rate)}[prompt_weight]
    inside = log_ratio <= ratio_max_log
    ratio = math.exp(min(log_ratio, ratio_max_log))
    if correct:
        return -omega * math.log(ratio), -omega if inside else 0.0
    clamped = max((1.0 - rate * ratio) / (1.0 - rate), clamp)
    slope = rate * ratio / ((1.0 - rate) * clamped) if inside else 0.0
    return -negative_weight * omega * math.log(clamped), negative_weight * omega * slope


def random_tokens(seed=0, n=400):
    g = torch.Generator().manual_seed(seed)
    behaviour = -3.0 * torch.rand(n, generator=g, dtype=torch.float64)
    logprobs = (behaviour + 1.2 * torch.randn(n, generator=g, dtype=torch.float64)).clamp(max=0.0)
    correct = torch.randint(0, 2, (n,), generator=g).double()
    rate = 0.02 + 0.96 * torch.rand(n, generator=g, dtype=torch.float64)
    return logprobs.requires_grad_(), behaviour, correct, rate


@pytest.mark.parametrize("options", CASES, ids=str)
def test_value_and_gradient_equal_the_equation(options):
    logprobs, behaviour, correct, rate = random_tokens()
    loss = nft_loss(logprobs, behaviour, correct, rate, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    log_ratio = (logprobs - behaviour).tolist()
    expected = [reference(*x, **options) for x in zip(log_ratio, correct.tolist(), rate.tolist())]
    np.testing.assert_allclose(loss.detach(), [e[0] for e in expected], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(gradient, [e[1] for e in expected], rtol=1e-11, atol=1e-12)


def test_the_random_input_has_every_clamp_active():
    logprobs, behaviour, correct, rate = random_tokens()
    log_ratio = (logprobs - behaviour).detach()
    argument = (1 - rate * log_ratio.exp()) / (1 - rate)
    wrong = correct == 0
    assert (wrong & (argument < 0)).sum() > 10  # below zero: the logarithm alone would be NaN
    assert (wrong & (argument > 0) & (argument < 1)).sum() > 10
    assert (wrong & (argument > 1.3)).sum() > 10
    assert (log_ratio > 0.7).sum() > 10


def test_hand_computed_values():
    # R = 2 and 1/2, r = 1/4, eps = 1. Right: -log R. Wrong: x = (1 - R/4) / (3/4) = 2/3 -> 1, and 7/6.
    ratio = torch.tensor([2.0, 0.5, 2.0, 0.5], dtype=torch.float64)
    logprobs = (ratio.log() - 2.0).requires_grad_()
    behaviour = torch.full((4,), -2.0, dtype=torch.float64)
    correct, rate = torch.tensor([1, 1, 0, 0]), torch.full((4,), 0.25, dtype=torch.float64)
    loss = nft_loss(logprobs, behaviour, correct, rate, prompt_weight="uniform")
    expected = [-math.log(2), math.log(2), 0.0, -math.log(7 / 6)]
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-14, atol=1e-15)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    # wrong: (r R / (1 - r)) / max(x, 1) = 2/3 and (1/6) / (7/6) = 1/7
    np.testing.assert_allclose(gradient, [-1, -1, 2 / 3, 1 / 7], rtol=1e-14)
    weighted = nft_loss(logprobs, behaviour, correct, rate, prompt_weight="grpo", negative_weight=0.5)
    scale = math.sqrt(3) * np.array([1, 1, 0.5, 0.5])
    np.testing.assert_allclose(weighted.detach(), scale * expected, rtol=1e-14, atol=1e-15)


def test_float32_keeps_the_clamped_value_where_the_argument_is_huge():
    # x = (1 - 0.98 e^10) / 0.02 is about -1.08e6: x + (1 - x) is not 1 in float32.
    logprobs, behaviour = torch.zeros(1, requires_grad=True), torch.full((1,), -20.0)
    loss = nft_loss(logprobs, behaviour, torch.zeros(1), torch.full((1,), 0.98), clamp=1.0)
    assert loss.item() == 0.0


def test_negative_weight_zero_is_rft():
    logprobs, behaviour, correct, rate = random_tokens(3)
    for omega in ("uniform", "dr_grpo", "grpo"):
        a = nft_loss(logprobs, behaviour, correct, rate, negative_weight=0.0, prompt_weight=omega)
        b = rft_loss(logprobs, behaviour, correct, rate, prompt_weight=omega)
        weight = {"uniform": torch.ones_like(rate), "dr_grpo": 1 - rate, "grpo": ((1 - rate) / rate).sqrt()}[omega]
        plain = correct * -(logprobs - behaviour) * weight  # the supervised loss, up to a constant
        for other in (b, plain):
            torch.testing.assert_close(a, other, rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(
                torch.autograd.grad(a.sum(), logprobs, retain_graph=True),
                torch.autograd.grad(other.sum(), logprobs, retain_graph=True),
                rtol=1e-13,
                atol=1e-13,
            )


def test_behaviour_policy_gets_no_gradient_and_dtypes_may_differ():
    logprobs = torch.randn(5, requires_grad=True)
    behaviour = torch.randn(5, requires_grad=True)
    loss = nft_loss(logprobs, behaviour, torch.tensor([True, False, True, False, True]), torch.full((5,), 0.5))
    assert loss.dtype == torch.float32 and loss.shape == (5,)
    loss.sum().backward()
    assert behaviour.grad is None and logprobs.grad.abs().sum() > 0
    low = nft_loss(logprobs.bfloat16(), behaviour.bfloat16(), torch.ones(5), torch.full((5,), 0.5))
    assert low.dtype == torch.float32


def test_no_tokens_give_no_loss():
    empty = torch.zeros(0)
    assert nft_loss(empty, empty, empty, empty).shape == (0,)
    assert nft_sequence_loss(empty, empty, empty, empty, empty, empty.long()).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_weight": "dr-grpo"}, "'dr-grpo'.*uniform, dr_grpo, grpo"),
        ({"clamp": 0.0}, "clamp=0.0.*above 0"),
        ({"clamp": -1.0}, "clamp=-1.0"),
        ({"clamp": float("nan")}, "clamp=nan"),
        ({"negative_weight": -1.0}, "negative_weight=-1.0"),
        ({"ratio_max_log": 0.0}, "ratio_max_log=0.0"),
        ({"correct_rate": torch.tensor([0.5, 0.0, 0.5])}, r"\[0.0, 0.5\].*strictly between 0 and 1"),
        ({"correct_rate": torch.tensor([0.5, 1.0, 0.5])}, "strictly between 0 and 1"),
        ({"correct_rate": torch.tensor([0.5, float("nan"), 0.5])}, "strictly between 0 and 1"),
        ({"correct_rate": torch.tensor(0.5)}, r"correct_rate \(\)"),
        ({"correct": torch.ones(2)}, r"correct \(2,\)"),
        ({"behaviour_logprobs": torch.zeros(3, 1)}, r"behaviour_logprobs \(3, 1\)"),
        ({"logprobs": torch.zeros(1, 3)}, r"logprobs \(1, 3\)"),
    ],
)
def test_wrong_arguments_raise(change, message):
    good = {
        "logprobs": torch.zeros(3),
        "behaviour_logprobs": torch.zeros(3),
        "correct": torch.ones(3),
        "correct_rate": torch.full((3,), 0.5),
    }
    nft_loss(**good)
    with pytest.raises(ValueError, match=message):
        nft_loss(**(good | change))


@pytest.mark.parametrize("options", CASES, ids=str)
def test_sequence_ratio_equals_the_equation_per_answer(options):
    g = torch.Generator().manual_seed(5)
    segments = torch.arange(60).repeat_interleave(torch.randint(1, 9, (60,), generator=g))
    n = len(segments)
    mask = (torch.rand(n, generator=g) < 0.7).double()
    mask[segments == 7] = 0.0  # an answer without tokens, and the last segment as padding
    mask[segments == 59] = 0.0
    behaviour = -torch.rand(n, generator=g, dtype=torch.float64)
    logprobs = (behaviour + 0.5 * torch.randn(n, generator=g, dtype=torch.float64)).requires_grad_()
    correct = torch.randint(0, 2, (60,), generator=g).double()[segments]
    rate = (0.05 + 0.9 * torch.rand(60, generator=g, dtype=torch.float64))[segments]
    behaviour = torch.where(mask > 0, behaviour, torch.nan)  # outside the mask anything may stand

    loss = nft_sequence_loss(logprobs, behaviour, correct, rate, mask, segments, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    for s in range(60):
        tokens = ((segments == s) & (mask > 0)).nonzero().flatten()
        if len(tokens) == 0:
            assert loss[segments == s].abs().sum() == 0
            continue
        log_ratio = (logprobs - behaviour)[tokens].sum().item()
        value, slope = reference(log_ratio, correct[tokens[0]].item(), rate[tokens[0]].item(), **options)
        np.testing.assert_allclose(loss[tokens].sum().item(), value, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(loss[tokens].detach(), value / len(tokens), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(gradient[tokens], slope, rtol=1e-10, atol=1e-12)
    assert gradient[mask == 0].abs().sum() == 0


def test_sequence_ratio_refuses_shapes_that_differ():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="loss_mask"):
        nft_sequence_loss(x, x, x, x + 0.5, torch.ones(2), torch.zeros(3, dtype=torch.int64))
