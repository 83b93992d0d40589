"""What a node is like: versions, cores, memory, GPUs, ports and the files that it sees. Each node gathers its own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

from megatron_nft import __version__
from megatron_nft.config import Config
from megatron_nft.engines.engine import EngineError
from megatron_nft.engines.host import find_python
from megatron_nft.plan.doctor import probe
from megatron_nft.policy.cudnn import other_cudnns
from megatron_nft.processes import clean_environment, free_port

PROBE_LIMIT_S = 120.0  # a cold shared disk is slow
TRAINER_PACKAGES = ("megatron-core", "transformer-engine", "transformers")


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver sees it. Memory in MiB."""

    name: str
    used_mib: int
    total_mib: int
    driver: str


@dataclass(frozen=True)
class Environment:
    """A Python environment, as probe.py sees it; of a broken one only `problem` is sure."""

    python: str = ""
    torch: str = ""
    cuda: str | None = None
    nccl: str | None = None
    cudnn: list[list[int]] | None = None  # [that torch was built for, that is loaded]
    packages: dict[str, str] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class NodeFacts:
    """One node. Everything is as JSON has it, since it travels through the shared folder."""

    host: str
    version: str  # of this package
    ranks: int  # that will run here; 0 on a node of engines alone
    cores: int  # that a process may use
    memory_bytes: int  # that can still be had
    shared_memory_bytes: int  # free in /dev/shm
    gpus: list[Gpu]
    trainer: Environment
    engine: Environment | None  # None where no servers are started here
    other_cudnns: list[str]
    missing_files: list[str]
    port_problem: str
    deep: dict[str, str] = field(default_factory=dict)  # name of a deep check -> "" or why it failed

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        values = json.loads(text)
        values["gpus"] = [Gpu(**gpu) for gpu in values["gpus"]]
        values["trainer"] = Environment(**values["trainer"])
        values["engine"] = Environment(**values["engine"]) if values["engine"] else None
        return cls(**values)


def engine_packages(name: str) -> tuple[str, ...]:
    """Distributions of which one brings the engine; as in engines/NAME/kind.py, which imports too much to ask."""
    return (name, f"{name}-cpu")


def starts_servers(config: Config, ranks: int) -> bool:
    """Whether servers are started on a node with so many trainer ranks."""
    given = bool(config.rollout.server.urls or config.rollout.server.registry)
    return config.rollout.uses_servers and (ranks == 0 or not given)


def gather(config: Config, ranks: int, master_port: int | None) -> NodeFacts:
    """This node's facts. master_port: what the ranks will meet at, where that is on this node."""
    with ThreadPoolExecutor(3) as pool:
        trainer = pool.submit(probe_environment, [sys.executable], TRAINER_PACKAGES, os.environ)
        engine = pool.submit(_engine_environment, config) if starts_servers(config, ranks) else None
        gpus: Future[list[Gpu]] = pool.submit(read_gpus)
        return NodeFacts(
            host=os.uname().nodename,
            version=__version__,
            ranks=ranks,
            cores=len(os.sched_getaffinity(0)),
            memory_bytes=free_memory(),
            shared_memory_bytes=_free_shared_memory(),
            gpus=gpus.result(),
            trainer=trainer.result(),
            engine=engine.result() if engine else None,
            other_cudnns=other_cudnns(),
            missing_files=missing_files(config),
            port_problem=port_problem(master_port),
        )


def probe_environment(
    python: list[str], packages: tuple[str, ...], environment: Any, limit_s: float = PROBE_LIMIT_S
) -> Environment:
    """What the environment of an interpreter holds. Never raises: a broken one is a finding."""
    command = [*python, probe.__file__, *packages]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s, check=True, env=dict(environment)
        )
        return Environment(**json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return Environment(problem=f"{python[0]} did not import torch within {limit_s:.0f} s")
    except subprocess.CalledProcessError as e:
        said = (e.stderr or "").strip().splitlines()
        return Environment(problem=f"{python[0]} ended with status {e.returncode}{': ' + said[-1] if said else ''}")
    except (OSError, ValueError, IndexError, TypeError) as e:
        return Environment(problem=f"{python[0]} cannot be run: {e}")


def _engine_environment(config: Config) -> Environment:
    name, server = config.rollout.engine, config.rollout.server
    try:
        python = find_python(name, server.python)
    except EngineError as e:
        return Environment(problem=str(e))
    return probe_environment([str(python)], (*engine_packages(name), "sglang-router"), clean_environment() | server.env)


def read_gpus() -> list[Gpu]:
    """The GPUs that nvidia-smi lists; none where there is no nvidia-smi. Makes no CUDA context, which takes memory."""
    query = ["nvidia-smi", "--query-gpu=name,memory.used,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if all(number.isdigit() for number in visible):
        rows = [rows[int(number)] for number in visible if int(number) < len(rows)]
    return [Gpu(name, _mib(used), _mib(total), driver) for name, used, total, driver in rows]


def _mib(text: str) -> int:
    return int(text) if text.isdigit() else 0  # "[N/A]" where memory is shared with the host


def free_memory() -> int:
    """Bytes that can still be had on this host, or in this job's cgroup where that has less."""
    free: int = psutil.virtual_memory().available
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # not this version of cgroups, or "max"
            continue
    return free


def _free_shared_memory() -> int:
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return 0


def missing_files(config: Config) -> list[str]:
    """`key: path` of the settings' files and folders that this node does not see."""
    named = [("model.path", config.model.path)]
    named += [("data.train", path) for path in config.data.train] + [("eval.data", path) for path in config.eval.data]
    if config.model.chat_template is not None:
        named.append(("model.chat_template", config.model.chat_template))
    return [f"{key}: {path}" for key, path in named if not path.exists()]


def port_problem(master_port: int | None) -> str:
    """Why ranks or servers would find no port here; empty where they do."""
    try:
        free_port("0.0.0.0")
        if master_port is not None:
            with socket.socket() as s:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
                s.bind(("0.0.0.0", master_port))
    except OSError as e:
        where = "" if master_port is None else f"port {master_port}, at which the ranks meet: "
        return f"{where}{e.strerror or e}"
    return ""
