"""SGLang, as open.py's table finds it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_nft.engines.http import HttpEngineKind
from megatron_nft.engines.sglang.client import SGLangEngine
from megatron_nft.engines.sglang.command import command_line, environment, guarded
from megatron_nft.engines.sglang.memory import MEMORY_CALLS
from megatron_nft.engines.sglang.quantized import check_release
from megatron_nft.engines.sglang.router import Router
from megatron_nft.engines.versions import check_served_model, first_answer, named_version

if TYPE_CHECKING:
    from megatron_nft.config import RolloutConfig
    from megatron_nft.engines.engine import Engine
    from megatron_nft.policy.family import ModelSpec


def set_version(url: str, version: int, key: str | None) -> None:
    """Do nothing: the command line has told the server its version."""


def served_version(url: str, model: Path, key: str | None) -> str:
    """See `kind.HttpEngineKind.served_version`. The first of each pair of paths is that of older servers."""
    check_served_model(url, first_answer(url, ("/get_model_info", "/model_info"), key).get("model_path"), model)
    return named_version("sglang", first_answer(url, ("/get_server_info", "/server_info"), key))


def check_updates(rollout: RolloutConfig, spec: ModelSpec, engine: Engine) -> None:
    """See `EngineKind.check_updates`: which models a release updates, where it quantizes."""
    if rollout.server.quantization == "none":
        return
    assert isinstance(engine, SGLangEngine)
    answer = first_answer(engine.urls[0], ("/server_info", "/get_server_info"), engine.key)
    check_release(str(answer.get("version", "")), spec.family)


KIND = HttpEngineKind(
    name="sglang",
    packages=("sglang", "sglang-cpu"),
    client=SGLangEngine,
    command_line=command_line,
    environment=environment,
    guarded=guarded,
    set_version=set_version,
    memory_calls=MEMORY_CALLS,
    served_version=served_version,
    router=Router,
    check_updates=check_updates,
)
