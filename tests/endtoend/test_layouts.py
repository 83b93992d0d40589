"""One run in several layouts: the same questions, answers and verdicts, and the same weights up to rounding.

What each layout does with the samples (who generates them, which replica trains them, how they are packed, where the
denominator comes from) is different every time; what comes out must not be.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from runs import Run, make_start, merge, metrics_of

EXACT = ("accuracy/train", "groups/generated", "groups/kept", "groups/surplus", "tokens/generated", "tokens/trained")
CLOSE = ("loss/total", "loss/positive", "loss/negative", "grad_norm", "ratio/mean", "gap/mean", "lr", "policy/entropy")
LAYOUTS = {
    "PP 2": {"num_processes": 2, "policy__pipeline_model_parallel_size": 2},
    "PP 2, VPP 2, DP 2": {
        "num_processes": 4,
        "policy__pipeline_model_parallel_size": 2,
        "policy__virtual_pipeline_model_parallel_size": 2,
    },
    "TP 2 with sequence parallel, DP 2": {
        "num_processes": 4,
        "policy__tensor_model_parallel_size": 2,
        "policy__sequence_parallel": True,
    },
    "CP 2": {"num_processes": 2, "policy__context_parallel_size": 2},
    "TP 2 with sequence parallel, CP 2": {
        "num_processes": 4,
        "policy__tensor_model_parallel_size": 2,
        "policy__sequence_parallel": True,
        "policy__context_parallel_size": 2,
    },
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    """Two steps of two optimizer steps; groups are left over from the first. Four layers, for the virtual stages."""
    start = make_start(tmp_path_factory.mktemp("layouts"), layers=4)
    return merge(
        start,
        num_processes=1,
        policy__tensor_model_parallel_size=1,
        policy__micro_batch_tokens=40,  # two or three answers each, so that replicas need different numbers of them
        train__num_steps=2,
        checkpoint__every_steps=100,
        eval__data=[],
    )


@pytest.fixture(scope="module")
def alone(settings) -> Path:
    """The run in one process."""
    run = Run(settings)
    assert run.wait() == 0, run.text
    return run.run_dir


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def weights(folder: Path) -> np.ndarray:
    """All of them in one row, in the order of their names; every pipeline stage writes files of its own."""
    tensors = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    return np.concatenate([tensors[name].ravel().astype(np.float64) for name in sorted(tensors)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_the_same_model(settings, alone, layout):
    run = Run(merge(settings, run_dir=settings["run_dir"] + "-" + layout.replace(", ", "-"), **LAYOUTS[layout]))
    assert run.wait() == 0, run.text
    assert run.left_over() == []
    assert len(list((run.run_dir / "rollouts" / "step_000001").iterdir())) == LAYOUTS[layout]["num_processes"]
    expected, found = metrics_of(alone)[1:], metrics_of(run.run_dir)[1:]
    assert len(expected) == len(found) == 2 and expected[0]["groups/surplus"] > 0
    for a, b in zip(expected, found, strict=True):
        assert {name: b[name] for name in EXACT} == {name: a[name] for name in EXACT}
        for name in CLOSE:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name
        assert b["gap/max"] < 1e-4
    for receipt in map(read_json, sorted((run.run_dir / "sync").iterdir())):
        assert receipt["engine_checked"] > 0 and receipt["probe_difference"] < 1e-4
    start = weights(Path(settings["model"]["path"]))
    moved = weights(alone / "hf") - start
    assert np.linalg.norm(moved) > 0
    assert np.linalg.norm(weights(run.run_dir / "hf") - weights(alone / "hf")) < 1e-3 * np.linalg.norm(moved)
    manifest = read_json(run.run_dir / "checkpoints/step_000002/manifest.json")
    assert manifest["cursor"] == read_json(alone / "checkpoints/step_000002/manifest.json")["cursor"]
