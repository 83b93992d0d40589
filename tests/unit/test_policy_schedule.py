"""The learning-rate schedule, counted in optimizer steps; the first step never has lr 0."""

from types import SimpleNamespace

import pytest

from megatron_nft.config import OptimizerConfig
from megatron_nft.policy.optimizer import build_schedule


def rates(num_steps: int, **settings: object) -> list[float]:
    """lr of each of `num_steps` optimizer steps."""
    optimizer = SimpleNamespace(param_groups=[{}, {"wd_mult": 0.0}])
    schedule = build_schedule(optimizer, OptimizerConfig(lr=1.0, weight_decay=0.1, **settings), num_steps)
    found = []
    for _ in range(num_steps):
        schedule.step(1)
        found.append(optimizer.param_groups[0]["lr"])
        assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    return found


def test_warm_up_starts_at_one_step_not_at_zero() -> None:
    assert rates(6, lr_warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_without_warm_up() -> None:
    assert rates(3, lr_warmup_steps=0) == [1.0, 1.0, 1.0]


def test_linear_decay_ends_at_min_lr() -> None:
    found = rates(6, lr_warmup_steps=2, lr_decay_style="linear", min_lr=0.2)
    assert found == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_decay() -> None:
    # halfway between 1 and 0 at half of the 4 steps after warm-up
    found = rates(5, lr_warmup_steps=1, lr_decay_style="cosine")
    assert found == pytest.approx([1.0, 0.853553, 0.5, 0.146447, 0.0], abs=1e-6)


def test_a_run_shorter_than_its_warm_up() -> None:
    assert rates(2, lr_warmup_steps=10) == pytest.approx([0.1, 0.2])
