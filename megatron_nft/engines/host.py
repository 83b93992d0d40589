"""What this host has for an engine: an interpreter with it, and GPUs. Imports neither torch nor an engine."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_nft.engines.engine import EngineError

if TYPE_CHECKING:
    from megatron_nft.config import ServerConfig

MANY_HOSTS = ("--nnodes", "--node-rank", "--dist-init-addr", "--data-parallel-address", "--master-addr")
"""Arguments by which SGLang and vLLM join servers of several hosts to one."""


def one_host_problem(config: ServerConfig, gpus: int) -> str:
    """Why the servers of one host cannot have their GPUs there; empty where they can. gpus: 0 where it has none.

    An engine whose tensor-parallel ranks lie on several hosts is not supported: it would have to be started by all of
    them together, and end with any of them, and its weights come from the trainer's ranks of its own host.
    """
    if across := [a for a in config.extra_args if a.split("=")[0].replace("_", "-") in MANY_HOSTS]:
        return (
            f"rollout.server.extra_args: {across[0]} joins servers of several hosts to one engine, which is not "
            "supported: each engine's GPUs have to be on one host"
        )
    wanted = config.num_servers * config.tensor_parallel_size
    if 0 < gpus < wanted:
        return (
            f"rollout.server: {config.num_servers} servers x tensor_parallel_size {config.tensor_parallel_size} = "
            f"{wanted} GPUs, but this host has {gpus}; an engine's GPUs have to be on one host"
        )
    return ""


def find_python(engine: str, python: Path | None) -> Path:
    """The interpreter that has the engine: the one that is set, the checkout's .venv-ENGINE, or our own.

    EngineError where there is none.
    """
    if python is not None:
        if not os.access(python, os.X_OK):
            raise EngineError(f"rollout.server.python={python}: is not an executable file")
        return python
    venv = Path(__file__).parents[2] / f".venv-{engine}" / "bin" / "python"
    if venv.is_file():
        return venv
    if importlib.util.find_spec(engine) is not None:
        return Path(sys.executable)
    raise EngineError(
        f"no environment with {engine} was found: run `bash tools/install_engine.sh {engine}` in the checkout, "
        "set rollout.server.python to an interpreter that has it, or give the servers by rollout.server.urls"
    )
