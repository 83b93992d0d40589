"""Old answers and NFT's gradient, exactly: which weights give the on-policy gradient, and which cannot.

The sums over all groups are those of benchmarks/correction_bias.py; the last test draws groups and takes them through
the functions of a training step.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_nft.algorithms import open_algorithm, read_settings
from megatron_nft.data.grouping import classify
from megatron_nft.data.packing import pack
from megatron_nft.train.correction import corrected
from megatron_nft.types import Prompt, Rollout, RolloutGroup, Verdict

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import correction_bias as exact  # noqa: E402

UNBOUNDED = {"correction": "truncate", "correction_high": None}


def product_bias(length: int, staleness: int) -> float:
    """With the weight of the whole answer on every token, the product of its tokens' ratios: no setting gives it."""
    task = exact.TASKS[length]
    versions = exact.history(task, staleness, seed=0)
    trainer, engine = task.logprobs(versions[-1]), task.logprobs(versions[0])
    ones = torch.ones_like(trainer)
    product = (trainer - engine).sum(-1, keepdim=True).exp() * ones
    on_policy = exact.expected_gradient(task, versions[-1], trainer, ones, "dr_grpo")
    return exact.bias(exact.expected_gradient(task, versions[-1], engine, product, "dr_grpo"), on_policy)


def test_unbounded_weights_give_the_on_policy_gradient_of_answers_of_one_token():
    assert max(exact.biases(1, "dr_grpo", UNBOUNDED)) < 1e-12
    assert min(exact.biases(1, "dr_grpo", {})) > 1e-3


@pytest.mark.parametrize("length", [2, 3])
@pytest.mark.parametrize("staleness", exact.STALENESS)
def test_longer_answers_need_the_product_of_their_ratios(length, staleness):
    assert product_bias(length, staleness) < 1e-12
    assert exact.biases(length, "dr_grpo", UNBOUNDED)[staleness - 1] > 1e-3


def test_another_omega_and_each_bound_bias_even_one_token():
    for omega in ("uniform", "grpo"):
        assert exact.biases(1, omega, UNBOUNDED)[-1] > 1e-3
    for settings in ({"correction": "truncate", "correction_high": 1.1}, {"correction": "mask", "correction_low": 0.9}):
        assert exact.biases(1, "dr_grpo", settings)[-1] > 1e-3


def test_the_policy_gradient_by_hand():
    """With one right arm of two and K = 4: the groups kept have 1, 2 or 3 right answers, and NFT's expected gradient of
    the right arm's logit is -(1 - 1 / K) p (1 - p): Dr. GRPO's."""
    task = exact.Task(length=1, vocabulary=2, right=(0,))
    logits = torch.tensor([[0.3, -0.4]], dtype=torch.float64)
    logprobs = task.logprobs(logits)
    p = logprobs[0, 0].exp().item()
    found = exact.expected_gradient(task, logits, logprobs, torch.ones_like(logprobs), "dr_grpo")
    expected = -(1 - 1 / exact.K) * p * (1 - p)
    np.testing.assert_allclose(found, [[expected, -expected]], rtol=1e-12)


def test_the_table_of_the_documentation_is_current():
    page = (ROOT / "docs" / "nft.md").read_text(encoding="utf-8")
    assert exact.table() in page, "run python benchmarks/correction_bias.py and put what it prints into docs/nft.md"


def drawn_groups(task: exact.Task, trainer: torch.Tensor, engine: torch.Tensor, num: int) -> list[RolloutGroup]:
    """Questions answered by the engine with one of the arms, log-probs of both included."""
    arms = np.random.default_rng(1).choice(len(engine), size=(num, exact.K), p=engine[:, 0].exp().numpy())
    prompt = Prompt(0, "bandit", ({"role": "user", "content": "q"},), "0", np.array([9], np.int32))
    rows = [t.numpy().astype(np.float32) for t in (engine, trainer)]
    return [
        RolloutGroup(
            draw,
            prompt,
            [
                Rollout(
                    draw,
                    index,
                    np.array([arm], np.int32),
                    rows[0][arm],
                    "stop",
                    0,
                    "",
                    verdict=Verdict.CORRECT if arm in task.right else Verdict.WRONG,
                    trainer_logprobs=rows[1][arm],
                )
                for index, arm in enumerate(group)
            ],
            step=1,
        )
        for draw, group in enumerate(arms)
    ]


def drawn_gradient(task, trainer, engine, settings: dict, num: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error over groups of the gradient by the logits, [V] each, through the steps of training."""
    algorithm = open_algorithm(read_settings(settings), max_response_tokens=4)
    groups = drawn_groups(task, trainer, engine, num)
    samples = [s for g in groups if classify(g) == "kept" for s in algorithm.samples(g)]
    batch = pack(corrected(samples, algorithm.settings), range(len(samples)))
    logprobs = batch.behaviour_logprobs.clone().requires_grad_()  # the first update: R = 1
    loss = (algorithm.loss(logprobs, batch) * batch.weights).where(batch.loss_mask > 0, 0.0)
    (by_logprob,) = torch.autograd.grad(loss.sum(), logprobs)
    trained = batch.loss_mask > 0
    onehot = torch.nn.functional.one_hot(batch.labels[trained], task.vocabulary).double()
    rows = by_logprob[trained, None].double() * (onehot - trainer[:, 0].exp()) / exact.K  # d log p / d logits
    per_group = np.zeros((num, task.vocabulary))  # dropped groups add nothing
    np.add.at(per_group, [s.draw for s in samples], rows.numpy())
    return per_group.mean(0), per_group.std(0, ddof=1) / np.sqrt(num)


def test_drawn_groups_give_the_on_policy_gradient_within_three_standard_errors():
    task = exact.TASKS[1]
    versions = exact.history(task, max(exact.STALENESS), seed=0)
    trainer = task.logprobs(versions[-1])
    expected = exact.expected_gradient(task, versions[-1], trainer, torch.ones_like(trainer), "dr_grpo")[0].numpy()
    for staleness in exact.STALENESS:
        engine = task.logprobs(versions[-1 - staleness])
        mean, error = drawn_gradient(task, trainer, engine, UNBOUNDED)
        assert (np.abs(mean - expected) < 3 * error).all(), staleness
    mean, error = drawn_gradient(task, trainer, task.logprobs(versions[0]), {"behaviour": "recomputed"})
    assert (np.abs(mean - expected) > 3 * error).any()  # without weights the bias shows
