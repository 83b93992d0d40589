"""NFT is a policy gradient when strictly on-policy, through whole runs: benchmarks/identity.py in two layouts.

The command decides by itself whether what it states is true; what it compares is looked at here once more.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

COMMAND = Path(__file__).parents[2] / "benchmarks" / "identity.py"


def weights(run: Path) -> dict[str, np.ndarray]:
    return {name: t for path in (run / "hf").glob("*.safetensors") for name, t in load_file(path).items()}


def distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    assert a.keys() == b.keys() and a
    return max(float(np.abs(a[name].astype(np.float64) - b[name]).max()) for name in a)


@pytest.mark.parametrize("layout", ["tp2", pytest.param("pp2", marks=pytest.mark.long)])
def test_nft_ends_in_the_weights_of_the_policy_gradient_that_it_equals(tmp_path, layout):
    command = [sys.executable, str(COMMAND), "--layout", layout, "--steps", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| as said |") == 5
    start = load_file(tmp_path / "start" / "model" / "model.safetensors")
    found = {run: weights(tmp_path / run) for run in ("NFT(1 - r)", "Dr. GRPO", "NFT(sqrt)", "GRPO")}
    assert all(distance(start, ended) > 1e-4 for ended in found.values()), "a run has not moved"
    assert all(found["NFT(1 - r)"][name].tobytes() == t.tobytes() for name, t in found["Dr. GRPO"].items())
    assert distance(found["NFT(sqrt)"], found["GRPO"]) <= 1e-5
    assert distance(found["NFT(1 - r)"], found["NFT(sqrt)"]) > 1e-4
    for run in found:
        rows = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()][1:]
        assert len(rows) == 2
        for row in rows:
            assert row["ratio/max"] == row["ratio/max_inverse"] == row["ratio/mean"] == 1.0
            assert 0 < row["accuracy/train"] < 1 and row["age/max"] == 0
