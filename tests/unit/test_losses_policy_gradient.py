"""GRPO, Dr. GRPO and DAPO, and NFT's exact relation to them on-policy (float64, 1e-12)."""

import math

import numpy as np
import pytest
import torch

from megatron_nft.losses import advantages, nft_loss, policy_gradient_loss

K, LENGTH, VOCAB = 8, 6, 11


@pytest.fixture(scope="module")
def questions():
    """Four questions with 1, 3, 5 and 7 of 8 answers right, and a tabular policy: logits [answers, L, V]."""
    g = torch.Generator().manual_seed(0)
    right = torch.tensor([1, 3, 5, 7])
    correct = (torch.arange(K) < right[:, None]).double().flatten()  # [32]
    rate = (right / K).double().repeat_interleave(K)
    logits = torch.randn(len(correct), LENGTH, VOCAB, generator=g, dtype=torch.float64)
    actions = torch.randint(0, VOCAB, (len(correct), LENGTH), generator=g)
    return logits, actions, correct, rate


def gradient(questions, loss_of_tokens):
    """d sum(loss) / d logits, where the behaviour policy is the policy itself."""
    logits, actions, correct, rate = questions
    logits = logits.clone().requires_grad_()
    logprobs = logits.log_softmax(-1).gather(-1, actions[..., None]).flatten()  # [32 * L]
    loss = loss_of_tokens(
        logprobs, logprobs.detach(), correct.repeat_interleave(LENGTH), rate.repeat_interleave(LENGTH)
    )
    return torch.autograd.grad(loss.sum(), logits)[0]


def closed_form(questions, advantage_of):
    """The policy gradient -A d log pi / d logits = -A (onehot - softmax), without autograd."""
    logits, actions, correct, rate = questions
    onehot = torch.nn.functional.one_hot(actions, VOCAB).double()
    return -advantage_of(correct, rate)[:, None, None] * (onehot - logits.softmax(-1))


DR_GRPO = lambda c, r: c - r  # noqa: E731
GRPO = lambda c, r: (c - r) / (r * (1 - r)).sqrt()  # noqa: E731


@pytest.mark.parametrize(("omega", "advantage_of"), [("dr_grpo", DR_GRPO), ("grpo", GRPO)])
@pytest.mark.parametrize("clamp", [1.0, 0.5, 0.01])
def test_on_policy_gradient_of_nft_is_the_policy_gradient(questions, omega, advantage_of, clamp):
    ours = gradient(questions, lambda *x: nft_loss(*x, prompt_weight=omega, clamp=clamp))
    expected = closed_form(questions, advantage_of)
    assert expected.abs().max() > 0.1
    assert (ours - expected).abs().max() < 1e-12


@pytest.mark.parametrize(("kind", "advantage_of"), [("dr_grpo", DR_GRPO), ("grpo", GRPO), ("dapo", GRPO)])
def test_on_policy_gradient_of_our_baselines_is_the_policy_gradient(questions, kind, advantage_of):
    def loss(logprobs, behaviour, correct, rate):
        scores = [advantages(group, kind) for group in questions[2].view(-1, K).numpy()]
        scores = torch.tensor(np.concatenate(scores)).repeat_interleave(LENGTH)
        return policy_gradient_loss(logprobs, behaviour, scores, clip_low=0.2, clip_high=0.28)

    assert (gradient(questions, loss) - closed_form(questions, advantage_of)).abs().max() < 1e-12


def test_a_clamp_above_one_is_not_the_policy_gradient(questions):
    ours = gradient(questions, lambda *x: nft_loss(*x, clamp=1.5))
    assert (ours - closed_form(questions, DR_GRPO)).abs().max() > 1e-2


def test_value_and_gradient_equal_the_equation():
    g = torch.Generator().manual_seed(1)
    n, low, high, cap = 500, 0.2, 0.28, 0.9
    behaviour = -torch.rand(n, generator=g, dtype=torch.float64)
    logprobs = (behaviour + 0.6 * torch.randn(n, generator=g, dtype=torch.float64)).requires_grad_()
    advantage = torch.randn(n, generator=g, dtype=torch.float64)
    loss = policy_gradient_loss(logprobs, behaviour, advantage, clip_low=low, clip_high=high, ratio_max_log=cap)
    (got,) = torch.autograd.grad(loss.sum(), logprobs)
    seen = set()
    for d, a, value, slope in zip((logprobs - behaviour).tolist(), advantage.tolist(), loss.tolist(), got.tolist()):
        ratio = math.exp(min(d, cap))
        plain, clipped = ratio * a, min(max(ratio, 1 - low), 1 + high) * a
        assert value == pytest.approx(-min(plain, clipped), rel=1e-12)
        active = plain <= clipped and d <= cap
        assert slope == pytest.approx(-plain if active else 0.0, rel=1e-12)
        seen.add((a > 0, active, ratio < 1 - low, ratio > 1 + high))
    assert len(seen) >= 6  # clipped and not, above and below, for both signs


def test_hand_computed_clipping():
    # R: 1.5 (clipped to 1.28 for A > 0), 0.5 (clipped to 0.8 for A < 0), 1.1 (inside)
    logprobs = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1], dtype=torch.float64).log()
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0, 1.0], dtype=torch.float64)
    loss = policy_gradient_loss(logprobs, torch.zeros(5), advantage, clip_low=0.2, clip_high=0.28)
    np.testing.assert_allclose(loss, [-2.56, 3.0, -1.0, 1.6, -1.1], rtol=1e-12)


def test_advantages_by_hand():
    rewards = np.array([1.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(advantages(rewards, "dr_grpo"), [0.75, -0.25, -0.25, -0.25])
    # population standard deviation sqrt(1/4 * 3/4)
    np.testing.assert_allclose(advantages(rewards, "grpo"), np.array([3, -1, -1, -1]) / math.sqrt(3))
    np.testing.assert_allclose(advantages(2 * rewards - 1, "dapo"), np.array([3, -1, -1, -1]) / math.sqrt(3))
    # sample standard deviation sqrt((9/16 + 3/16) / 3) = 1/2
    np.testing.assert_allclose(advantages(rewards, "grpo", "sample"), [1.5, -0.5, -0.5, -0.5])
    assert advantages(np.ones(3) * 0.1, "grpo").tolist() == [0, 0, 0]
    assert advantages(np.ones(3) * 0.1, "grpo", "sample").tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"'unbiased': must be population or sample"):
        advantages(rewards, "grpo", "unbiased")
    with pytest.raises(ValueError, match=r"'ppo'.*grpo, dr_grpo, dapo"):
        advantages(rewards, "ppo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2), torch.zeros(3), torch.zeros(2)), "one length"),
        ((torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, 1)), "1-D"),
    ],
)
def test_shapes_that_differ_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        policy_gradient_loss(*arguments)


def test_an_empty_clip_range_raises():
    with pytest.raises(ValueError, match="clip_low=0"):
        policy_gradient_loss(*[torch.zeros(2)] * 3, clip_low=0.0, clip_high=0.2)
