"""The frame of the GPU measurements: rows survive an interruption, failures are rows, FLOPs by hand."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "gpu")]

import gpu_common  # noqa: E402
import gpu_graphs  # noqa: E402
import gpu_train_step  # noqa: E402

HELPERS = {"common", "servers", "session", "task"}
PARTS = sorted({p.stem.removeprefix("gpu_") for p in (ROOT / "benchmarks").glob("gpu_*.py")} - HELPERS)


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu_common, "machine", lambda: "2026-01-01, a card")
    monkeypatch.setattr(gpu_common, "free_memory", lambda: None)
    return lambda part="lm_head": gpu_common.Results(part, "what it is")


def test_a_row_that_is_there_is_not_measured_again(results, tmp_path):
    calls = []

    def work() -> dict:
        calls.append(1)
        return {"ms": 12.345, "optimizer": "x"}

    assert results().measure("ours", work) == {"ms": 12.345, "optimizer": "x"}
    assert results().measure("ours", work) == {"ms": 12.345, "optimizer": "x"}  # another process
    assert results("other").get("ours") is None
    assert len(calls) == 1
    results().measure("ours", work, again=True)
    assert len(calls) == 2
    text = (tmp_path / "tables.md").read_text()
    assert "## lm_head" in text
    assert "2026-01-01, a card" in text
    assert text.count("| ours | 12.35 | x |") == 1


def test_a_failure_is_a_row_and_is_tried_again(results, tmp_path, capsys):
    def fail() -> dict:
        raise RuntimeError("CUDA out of memory\nand more")

    assert results().measure("plain", fail) is None
    assert "RuntimeError: CUDA out of memory |" in (tmp_path / "tables.md").read_text()
    assert "Traceback" in capsys.readouterr().err
    assert results().measure("plain", lambda: {"ms": 1.0}) == {"ms": 1.0}
    assert "out of memory" not in (tmp_path / "tables.md").read_text()


def test_training_flops_by_hand():
    # a layer of Qwen2.5-7B: 3584 x (2 x 3584 + 2 x 512) + 3 x 3584 x 18944 = 233,046,016 weights
    spec = gpu_common.spec_7b(2, vocab_size=1000)
    weights = 2 * 233_046_016 + 1000 * 3584
    attention = 2 * (2 * 3584 * 10**2 + 2 * 3584 * 20**2)
    assert gpu_common.training_flops(spec, [10, 20]) == 6 * weights * 30 + 3 * attention


def test_targets_are_met_or_missed():
    assert gpu_common.verdict(51.234, at_most=58.6) == "met (51.23, at most 58.6)"
    assert gpu_common.verdict(58.7, at_most=58.6) == "missed (58.7, at most 58.6)"
    assert gpu_common.verdict(1.4, at_least=1.4) == "met (1.4, at least 1.4)"
    assert gpu_common.verdict(0.5, at_least=0.55) == "missed (0.5, at least 0.55)"
    bf16, tensorwise = {"TFLOP/s": 400.0, "share of bf16 ceiling": 0.51}, {"TFLOP/s": 600.0}
    assert gpu_train_step.target("none", bf16, None) == "missed (0.51, at least 0.6)"
    assert gpu_train_step.target("tensorwise", tensorwise, bf16) == "met (1.5, at least 1.4)"
    assert gpu_train_step.target("tensorwise", tensorwise, None) == "no bf16 row"


def test_no_gpu_is_said(monkeypatch):
    monkeypatch.setattr(gpu_common.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu_common.machine()


def test_gpu_sh_without_a_gpu_says_so_and_unpacks_nothing(tmp_path):
    bundles = tmp_path / "bundles"
    bundles.mkdir()
    (bundles / "te-0.tar.xz").write_bytes(b"not opened")
    settings = {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    settings |= {"NFT_GPU_HOME": str(tmp_path / "home"), "NFT_GPU_BUNDLES": str(bundles)}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "ceilings", "lm_head"]
    env = {**os.environ, **settings}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "gpu.sh: no CUDA device" in done.stderr
    assert done.stdout == ""
    assert [p.name for p in tmp_path.iterdir()] == ["bundles"]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_says_at_once_that_it_needs_a_gpu(part, monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [f"gpu_{part}.py"])
    monkeypatch.setattr(gpu_common.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        runpy.run_path(str(ROOT / "benchmarks" / f"gpu_{part}.py"), run_name="__main__")
    assert list(tmp_path.iterdir()) == []


def test_time_on_the_device_is_counted_once_where_kernels_overlap():
    # 0-2 and 1-3 overlap, 5-6 stands alone, 5.5-5.75 lies inside it: 3 + 1
    assert gpu_graphs.busy_us([(5, 6), (0, 2), (1, 3), (5.5, 5.75)]) == 4
    assert gpu_graphs.busy_us([]) == 0
