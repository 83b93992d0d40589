"""A run with an algorithm that lives outside of the package, named as module:Class."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import yaml
from objectives import ALGORITHM_DEFAULTS
from safetensors.torch import load_file

from runs import Run, make_start, merge, metrics_of

STRENGTH = 3.0
FILE = Path(__file__).with_name("own_likelihood.py")


def test_two_steps_with_an_algorithm_of_your_own(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "my_loss.py").write_text(FILE.read_text())
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "elsewhere"), prepend=os.pathsep)
    start = merge(
        make_start(tmp_path),
        num_processes=1,
        policy__tensor_model_parallel_size=1,
        train__num_steps=2,
        train__questions_per_step=2,
        rollout__max_staleness=0,
        metrics__entropy_every_steps=2,
        algorithm={"name": "my_loss:OwnLikelihood", "strength": STRENGTH, "loss_divisor": "tokens"},
        eval__data=[],
    )
    run = Run(start)
    assert run.wait() == 0, run.text

    algorithm = yaml.safe_load((run.run_dir / "config.yaml").read_text())["algorithm"]
    assert algorithm == {**start["algorithm"], **ALGORITHM_DEFAULTS}
    before = load_file(Path(start["model"]["path"]) / "model.safetensors")
    after = load_file(run.run_dir / "hf" / "model.safetensors")
    assert any(not torch.equal(after[name], before[name]) for name in after)
    steps = [row for row in metrics_of(run.run_dir) if row["step"]]
    assert len(steps) == 2
    assert [row["policy/entropy"] is not None for row in steps] == [False, True]
    for row in steps:
        share = row["tokens/positive_share"]
        assert 0 < share < 1
        assert row["own/advantage"] == pytest.approx(share - 0.5 * (1 - share))
        # each step is one optimizer step, whose policy generated the data: every ratio is 1
        assert row["loss/total"] == pytest.approx(-STRENGTH * row["own/advantage"], rel=1e-4)
        assert row["loss/positive"] == pytest.approx(-STRENGTH, rel=1e-4)


def test_its_settings_are_validated_before_any_rank_starts(tmp_path, monkeypatch):
    (tmp_path / "my_loss.py").write_text(FILE.read_text())
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    run = Run(merge(make_start(tmp_path), algorithm={"name": "my_loss:OwnLikelihood", "strength": -1.0}))
    assert run.wait() == 2
    assert "algorithm.strength = -1.0: input should be greater than 0" in run.text
    assert not run.run_dir.exists()
