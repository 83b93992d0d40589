"""SGLang, as open.py's table finds it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_nft.engines.http import HttpEngineKind
from megatron_nft.engines.sglang.client import SGLangEngine
from megatron_nft.engines.sglang.command import command_line, environment, guarded
from megatron_nft.engines.sglang.memory import MEMORY_CALLS
from megatron_nft.engines.sglang.router import Router
from megatron_nft.engines.versions import check_served_model, first_answer, named_version

if TYPE_CHECKING:
    from megatron_nft.config import RolloutConfig
    from megatron_nft.policy.family import ModelSpec


def set_version(url: str, version: int, key: str | None) -> None:
    """Do nothing: the command line has told the server its version."""


def served_version(url: str, model: Path, key: str | None) -> str:
    """See `kind.HttpEngineKind.served_version`. The first of each pair of paths is that of older servers."""
    check_served_model(url, first_answer(url, ("/get_model_info", "/model_info"), key).get("model_path"), model)
    return named_version("sglang", first_answer(url, ("/get_server_info", "/server_info"), key))


def check_updates(rollout: RolloutConfig, spec: ModelSpec) -> None:
    """ValueError for models whose live update the quantizing loader of SGLang 0.5.17 gets wrong.

    It quantizes every tensor that is not on a list of names: query and key norms, which stay bf16, would get FP8 values
    without their scales, and it does not know the fused tensors of experts.
    """
    quantization = rollout.server.quantization
    parts = ["query and key norms"] * spec.qk_layernorm + ["experts"] * bool(spec.num_experts)
    if quantization != "none" and parts:
        raise ValueError(
            f"rollout.server.quantization={quantization} with rollout.engine=sglang: live updates of a model with "
            f"{' and '.join(parts)} come out wrong. Allowed for this model: none"
        )


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
