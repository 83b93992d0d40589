"""What a node gathers, and how nodes meet in a folder: with broken interpreters, busy ports, other clocks and locks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from test_doctor_checks import ENGINE, NODE, TRAINER

from megatron_nft.config import load_config
from megatron_nft.plan.doctor import command, facts, meeting
from megatron_nft.plan.doctor.deep import write_tiny_model
from megatron_nft.plan.doctor.facts import NodeFacts, gather, missing_files, port_problem, probe_environment, read_gpus

ROOT = Path(__file__).resolve().parents[2]


def interpreter(folder: Path, script: str) -> list[str]:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return [str(path)]


def test_the_environment_of_an_interpreter():
    import torch

    found = probe_environment([sys.executable], ("torch", "nothing-of-the-kind"), os.environ, 300)
    assert found.problem == "" and found.torch == torch.__version__ and found.cuda == torch.version.cuda
    assert found.packages.keys() == {"torch"}
    assert found.python == ".".join(map(str, sys.version_info[:3]))


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("echo 'Illegal instruction' >&2; exit 3", "ended with status 3: Illegal instruction"),
        ("exec sleep 60", "did not import torch within 0 s"),
        ("echo nothing", "cannot be run"),
    ],
)
def test_an_environment_that_does_not_work(tmp_path, script, problem):
    found = probe_environment(interpreter(tmp_path, script), (), os.environ, 0.3 if "sleep" in script else 60)
    assert problem in found.problem
    assert "cannot be run" in probe_environment([str(tmp_path / "none")], (), os.environ).problem


def test_a_torch_that_does_not_import(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    found = probe_environment([sys.executable], (), {**os.environ, "PYTHONPATH": str(tmp_path)})
    assert found.problem == "import torch: ImportError: libcudart.so.13: cannot open shared object file"


def test_facts_travel_as_json():
    for node in NODE, replace(NODE, engine=None, gpus=[], deep={"a": "b"}):
        assert NodeFacts.from_json(node.to_json()) == node


def test_gpus_as_nvidia_smi_lists_them(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\necho 'NVIDIA H100, 512, 81559, 580.95'\necho 'NVIDIA GB10, [N/A], [N/A], 580.95'\n"
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert read_gpus() == []  # it cannot be run
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    h100, gb10 = read_gpus()
    assert (h100.name, h100.used_mib, h100.total_mib, h100.driver) == ("NVIDIA H100", 512, 81559, "580.95")
    assert (gb10.name, gb10.used_mib) == ("NVIDIA GB10", 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert read_gpus() == [gb10]


def test_ports():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port_problem(port) == f"port {port}, at which the ranks meet: Address already in use"
        assert port_problem(None) == ""
    assert port_problem(port) == ""


def test_no_port_is_left(monkeypatch):
    def none(host):
        raise OSError(f"no free port on {host}")

    monkeypatch.setattr(facts, "free_port", none)
    assert port_problem(None) == "no free port on 0.0.0.0"


@pytest.fixture
def config_file(tmp_path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "q.jsonl").touch()
    settings = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": [str(tmp_path / "q.jsonl")]},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "c.yaml"


def test_missing_files(config_file, tmp_path):
    config = load_config([config_file], [f"eval.data=[{tmp_path}/none.jsonl]"])
    assert missing_files(config) == [f"eval.data: {tmp_path}/none.jsonl"]
    assert missing_files(load_config([config_file], [])) == []


def test_which_nodes_have_an_engine(config_file, monkeypatch):
    monkeypatch.setattr(
        facts, "probe_environment", lambda python, packages, env: TRAINER if "megatron-core" in packages else ENGINE
    )
    for overrides, ranks, there in (
        ([], 2, False),
        (["rollout.engine=sglang"], 2, True),
        (["rollout.engine=sglang", "rollout.server.urls=[http://h:1]"], 2, False),
        (["rollout.engine=sglang", "rollout.server.registry=r"], 2, False),
        (["rollout.engine=sglang", "rollout.server.registry=r"], 0, True),
    ):
        found = gather(load_config([config_file], [*overrides, f"rollout.server.python={sys.executable}"]), ranks, None)
        assert (found.engine == ENGINE) == there and found.trainer == TRAINER


def meet(folder: Path, *, ahead_s: float = 0.0, flock: str | None = None) -> meeting.Meeting:
    """Node 0 and, in another process with a clock and a flock of its own, node 1."""
    broken = (
        "def flock(*_):\n    raise OSError(errno.EOPNOTSUPP, 'x')\nfcntl.flock = flock\n" if flock == "missing" else ""
    )
    broken = "fcntl.flock = lambda *_: None\n" if flock == "local" else broken
    script = (
        f"import errno, fcntl, sys, time\nreal = time.time\ntime.time = lambda: real() + {ahead_s}\n{broken}"
        "from pathlib import Path\nfrom megatron_nft.plan.doctor.meeting import meet\n"
        "from megatron_nft.plan.doctor.facts import NodeFacts\n"
        "print(meet(Path(sys.argv[1]), 1, 2, NodeFacts.from_json(sys.argv[2]), 60.0))"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(folder), replace(NODE, host="h2").to_json()],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with other, ThreadPoolExecutor(1) as pool:
        found = pool.submit(meeting.meet, folder, 0, 2, NODE, 60.0).result(120)
        assert other.stdout.read() == "None\n"
    assert found is not None and [a.facts.host for a in found.answers.values()] == ["h1", "h2"] and not found.silent
    return found


@pytest.mark.parametrize(("flock", "lock"), [(None, "held"), ("missing", "missing"), ("local", "free")])
def test_two_nodes_meet(tmp_path, flock, lock):
    found = meet(tmp_path / "m", flock=flock)
    assert found.answers[1].lock == lock
    low, high = found.answers[1].ahead_s
    assert low <= 0 <= high
    meeting.clean_up(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ahead_s", [3600.0, -3600.0])
def test_a_clock_that_is_wrong(tmp_path, ahead_s):
    low, high = meet(tmp_path / "m", ahead_s=ahead_s).answers[1].ahead_s
    assert low <= ahead_s <= high and high - low < 120


def test_a_node_that_does_not_come(tmp_path):
    found = meeting.meet(tmp_path / "m", 0, 2, NODE, 0.2)
    assert list(found.answers) == [0]
    assert meeting.meet(tmp_path / "other", 1, 2, NODE, 0.2) is None  # and does not wait for ever itself


def test_a_node_that_sees_nothing(tmp_path, monkeypatch):
    (tmp_path / "1.facts").write_text(replace(NODE, host="h2").to_json())
    monkeypatch.setattr(meeting, "ANSWER_S", 0.2)
    found = meeting.meet(tmp_path, 0, 2, NODE, 0.2)
    assert found.silent == [1]


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        ([], {}, (0, 1, None)),
        (["--nodes=2", "--node=1", "--meeting=a"], {}, (1, 2, "a")),
        (
            [],
            {"STEP_ID": "3", "STEP_NUM_NODES": "4", "STEP_NUM_TASKS": "4", "NODEID": "2", "JOB_ID": "7"},
            (2, 4, "7_0_3"),
        ),
        (["--nodes=1"], {"STEP_ID": "3", "STEP_NUM_NODES": "4", "STEP_NUM_TASKS": "4"}, (0, 1, None)),
        (["--nodes=2"], {}, "needs --meeting NAME"),
        (["--nodes=2", "--node=2", "--meeting=a"], {}, "--node 2: must be below --nodes 2"),
        (
            [],
            {"STEP_ID": "3", "STEP_NUM_NODES": "2", "STEP_NUM_TASKS": "16", "NODEID": "0", "JOB_ID": "7"},
            "one task on each",
        ),
    ],
)
def test_the_place_of_a_node(arguments, environment, expected, monkeypatch):
    import argparse

    for name in [n for n in os.environ if n.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(["--config=c", *arguments])
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            command._place(args)
    else:
        node, num_nodes, name = command._place(args)
        assert (node, num_nodes) == expected[:2]
        assert name == (expected[2] or f"{os.uname().nodename}_{os.getpid()}")


@pytest.mark.parametrize(("changes", "status"), [({}, 0), ({"ranks": 16}, 1)])
def test_the_exit_status(config_file, monkeypatch, capsys, changes, status):
    from megatron_nft.cli import main

    monkeypatch.setattr(facts, "gather", lambda config, ranks, port: replace(NODE, engine=None, **changes))
    assert main(["doctor", "--config", str(config_file), "--nodes=1"]) == status
    assert ("the run would fail: 1 problem" in capsys.readouterr().out) == bool(status)
    assert list((config_file.parent / "run" / "doctor").iterdir()) == []
    assert main(["doctor", "--config", str(config_file), "nothing.such=1"]) == 2
    (config_file.parent / "file").touch()
    assert main(["doctor", "--config", str(config_file), "--nodes=1", f"run_dir={config_file.parent}/file"]) == 1
    assert "cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "qwen3_moe"])
def test_a_tiny_model_of_the_same_kind(tmp_path, family):
    """Of a model with sizes of its own: the same architecture, loadable, with the vocabulary of the tokenizer."""
    from tiny import make_model
    from transformers import AutoModelForCausalLM

    source = make_model(tmp_path / "source", family, hidden=96, layers=3, heads=6, kv_heads=3)
    out = write_tiny_model(source, tmp_path / "out")
    config, given = (json.loads((folder / "config.json").read_text()) for folder in (out, source))
    assert config["architectures"] == given["architectures"] and config["vocab_size"] == given["vocab_size"]
    assert (config["hidden_size"], config["num_hidden_layers"]) == (256, 2)
    assert AutoModelForCausalLM.from_pretrained(out).config.hidden_size == 256
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
