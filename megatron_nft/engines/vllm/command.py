"""The command line and the environment of a vLLM server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_nft.engines import keys
from megatron_nft.engines.engine import EngineError
from megatron_nft.engines.patience import reads_weights
from megatron_nft.engines.vllm import worker
from megatron_nft.weights import checksum

if TYPE_CHECKING:
    from megatron_nft.config import ServerConfig

MODEL_NAME = "policy"
CPU_KV_CACHE_GIB = 1
WORKER_FOLDERS = (Path(worker.__file__).parent, Path(checksum.__file__).parent)  # on the PYTHONPATH of its workers
EXTENSION = "nft_vllm_extension.WeightReceiver"  # takes the weights inside vLLM's workers
OWN_TRANSFER = {name: f'--weight-transfer-config={{"backend": "{name}"}}' for name in ("ipc", "nccl")}
"""Backend of vLLM's own weight transfer -> the argument with which a server has it"""


def command_line(
    python: Path, model_path: Path, config: ServerConfig, *, device: str, dtype: str, gpu: int, weight_version: int
) -> list[str]:
    """See `kind.CommandLine`."""
    for setting in ("fp32_lm_head", "max_total_tokens"):
        if getattr(config, setting):
            raise EngineError(f"rollout.server.{setting} is offered by rollout.engine=sglang, not by vllm")
    arguments: dict[str, Any] = {
        "model": model_path,
        "served-model-name": MODEL_NAME,
        "host": config.host,
        "dtype": dtype,
        "tensor-parallel-size": config.tensor_parallel_size,
        "max-num-seqs": config.max_running_requests,
        "logprobs-mode": "processed_logprobs",  # at the sampling temperature, not at 1
    }
    flags = ["enable-scale-out", "disable-uvicorn-access-log"]  # the first opens the endpoint of PATH
    flags += ["enable-sleep-mode"] * config.memory_saver
    if device == "cpu":
        arguments["max-num-seqs"] = config.max_running_requests or 64
        flags.append("enforce-eager")
    else:
        arguments["gpu-memory-utilization"] = config.mem_fraction_static
        flags += ["enforce-eager"] * (not config.cuda_graphs)
    if not reads_weights(config, weight_version):
        arguments["load-format"] = "dummy"
    if config.kv_cache_dtype != "auto":
        if device == "cpu":
            raise EngineError(
                f"rollout.server.kv_cache_dtype={config.kv_cache_dtype} needs a GPU; on a CPU leave it at auto"
            )
        arguments["kv-cache-dtype"] = config.kv_cache_dtype
    if config.quantization != "none":
        arguments["quantization"] = config.quantization
    given = [f"--{name}={value}" for name, value in arguments.items() if value is not None]
    if not _names_extension(config):
        given.append(OWN_TRANSFER["ipc"] if device == "cuda" else f"--worker-extension-cls={EXTENSION}")
    module = "vllm.entrypoints.openai.api_server"
    return [str(python), "-m", module, *given, *(f"--{f}" for f in flags), *config.extra_args]


def for_other_hosts(server: ServerConfig) -> ServerConfig:
    """See `kind.ServerKind.for_other_hosts`: the handles of the backend `ipc` do not leave a host."""
    chosen = any(argument.startswith("--weight-transfer-config") for argument in server.extra_args)
    if chosen or _names_extension(server):
        return server
    return server.model_copy(update={"extra_args": [*server.extra_args, OWN_TRANSFER["nccl"]]})


def guarded(command: list[str]) -> list[str]:
    """See `kind.ServerKind.guarded`. vLLM's own key guards /v1 and /inference alone, not the calls that control it."""
    return [*command, "--middleware=nft_guard.KeyCheck"]


def environment(config: ServerConfig, *, device: str, gpu: int) -> dict[str, str]:
    """See `kind.Environment`."""
    common = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # the weight update endpoints
        "PYTHONPATH": os.pathsep.join(
            filter(None, [*map(str, (*WORKER_FOLDERS, keys.FOLDER)), os.environ.get("PYTHONPATH")])
        ),
    }
    if device == "cpu":
        # vLLM compiles helpers of its sampler even when eager; torch's compiler fails in folders with a space.
        eager = {"TORCHDYNAMO_DISABLE": "1"}
        return common | eager | {"VLLM_CPU_KVCACHE_SPACE": str(CPU_KV_CACHE_GIB), "OMP_NUM_THREADS": "1"}
    given = os.environ.get("CUDA_VISIBLE_DEVICES")  # of the trainer, whose GPUs are counted within it
    known = given.split(",") if given else [str(i) for i in range(gpu + config.tensor_parallel_size)]
    gpus = ",".join(known[gpu : gpu + config.tensor_parallel_size])
    batch_invariant = {"VLLM_BATCH_INVARIANT": "1"} if config.deterministic else {}
    # Handles of the trainer's memory come over HTTP as a pickle. The key of the run keeps others away from that path.
    own_transfer = {} if _names_extension(config) else {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    return common | {"CUDA_VISIBLE_DEVICES": gpus} | batch_invariant | own_transfer


def _names_extension(config: ServerConfig) -> bool:
    """Whether `extra_args` names a worker extension: ours, in place of vLLM's own transfer, or one built on it."""
    return any(argument.startswith("--worker-extension-cls") for argument in config.extra_args)
