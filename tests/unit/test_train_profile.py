"""Profiles of steps: which are taken, what is in them, and what needs a GPU."""

import gzip
import json

import pytest
import torch

from megatron_nft.config import TrainConfig
from megatron_nft.train.lifecycle import Phases
from megatron_nft.train.profile import Profiler

CPU = torch.device("cpu")


@pytest.fixture
def phases(tmp_path):
    phases = Phases(0, tmp_path, stall_timeout_s=60)
    yield phases
    phases.close()


def steps(profiler: Profiler, phases: Phases, *numbers: int) -> None:
    phases.mark = profiler.mark
    for number in numbers:
        with profiler.step(number):
            for name in ("generate", "train"):
                with phases(name):
                    torch.ones(8) @ torch.ones(8)


def test_a_trace_holds_the_phases_of_the_chosen_steps(tmp_path, phases):
    settings = TrainConfig(profile="torch", profile_steps=[2, 4], profile_ranks=[0, 3])
    steps(Profiler(settings, tmp_path, 3, CPU), phases, 1, 2, 3, 4)
    files = sorted(tmp_path.glob("profile/*"))
    assert [f.name for f in files] == [
        "step_000002_rank_00003.trace.json.gz",
        "step_000004_rank_00003.trace.json.gz",
    ]
    for file in files:
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        ranges = [e for e in events if e.get("cat") == "user_annotation"]
        assert [e["name"] for e in sorted(ranges, key=lambda e: e["ts"])] == ["generate", "train"]
        products = [e for e in events if e["name"] == "aten::dot"]
        assert len(products) == 2
        for product, phase in zip(sorted(products, key=lambda e: e["ts"]), ranges, strict=True):
            assert phase["ts"] <= product["ts"] <= phase["ts"] + phase["dur"]


@pytest.mark.parametrize("settings", [{"profile": None}, {"profile": "torch", "profile_ranks": [1]}])
def test_other_ranks_and_runs_write_nothing(tmp_path, phases, settings):
    steps(Profiler(TrainConfig(**settings), tmp_path, 0, CPU), phases, 3)
    assert not (tmp_path / "profile").exists()


def test_a_step_that_fails_leaves_no_trace_and_the_error(tmp_path):
    profiler = Profiler(TrainConfig(profile="torch"), tmp_path, 0, CPU)
    with pytest.raises(RuntimeError, match="first cause"), profiler.step(3):
        raise RuntimeError("first cause")
    assert list((tmp_path / "profile").iterdir()) == []


@pytest.mark.parametrize("tool", ["nsys", "memory"])
def test_tools_of_the_gpu_are_refused_without_one(tmp_path, tool):
    with pytest.raises(ValueError, match=f"train.profile={tool} needs a GPU"):
        Profiler(TrainConfig(profile=tool), tmp_path, 0, CPU)


def test_calls_on_a_gpu(tmp_path, phases, monkeypatch):
    """The order of torch's calls, with stand-ins for them: recording is on for the chosen step alone."""
    calls = []

    class Range:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            calls.append(f"begin {self.name}")

        def __exit__(self, *_):
            calls.append(f"end {self.name}")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("wait"))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    monkeypatch.setattr(torch.cuda.nvtx, "range", Range)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **given: calls.append(given))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(path))
    gpu = torch.device("cuda", 0)
    steps(Profiler(TrainConfig(profile="nsys", profile_steps=[2]), tmp_path, 0, gpu), phases, 1, 2, 3)
    ranges = ["begin generate", "end generate", "begin train", "end train"]
    assert calls == ["wait", "start", *ranges, "wait", "stop"]
    calls.clear()
    steps(Profiler(TrainConfig(profile="memory", profile_steps=[2]), tmp_path, 0, gpu), phases, 1, 2, 3)
    snapshot = str(tmp_path / "profile" / "step_000002_rank_00000.memory.pickle")
    assert calls == [{"max_entries": 200_000}, snapshot, {"enabled": None}]
