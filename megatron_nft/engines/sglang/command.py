"""The command line and the environment of an SGLang server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_nft.engines import keys
from megatron_nft.engines.engine import EngineError
from megatron_nft.engines.patience import reads_weights

if TYPE_CHECKING:
    from megatron_nft.config import ServerConfig

MODULE = ["-m", "sglang.launch_server"]
CPU_MAX_TOTAL_TOKENS = 32768
MODEL_NAME = "policy"  # a name of our own: it stays when weights are updated
QUIET_HEALTH = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false"}
"""/health then asks the model for no token: whoever asks it, such as the router, would wake a sleeping engine."""
QUANTIZED_LOADER = "flash_rl"
"""Quantizes what a live update brings. SGLang's usual loader quantizes once, when the server starts, and its parameters
cannot take bf16 weights afterwards."""


def command_line(
    python: Path, model_path: Path, config: ServerConfig, *, device: str, dtype: str, gpu: int, weight_version: int
) -> list[str]:
    """See `kind.CommandLine`. Remote code stays refused, which is the default."""
    arguments: dict[str, Any] = {
        "model-path": model_path,
        "served-model-name": MODEL_NAME,
        "host": config.host,
        "device": device,
        "dtype": dtype,
        "tp-size": config.tensor_parallel_size,
        "mem-fraction-static": config.mem_fraction_static,
        "max-total-tokens": config.max_total_tokens,
        "max-running-requests": config.max_running_requests,
        "weight-version": weight_version,
        "log-level-http": "warning",
    }
    flags = ["skip-server-warmup"]
    if device == "cpu":
        arguments |= {"attention-backend": "torch_native", "sampling-backend": "pytorch", "grammar-backend": "none"}
        arguments["max-total-tokens"] = config.max_total_tokens or CPU_MAX_TOTAL_TOKENS
        arguments["max-running-requests"] = config.max_running_requests or 64
        flags += ["disable-overlap-schedule", "disable-cuda-graph", "sleep-on-idle"]
    else:
        arguments["base-gpu-id"] = gpu
        arguments["mm-feature-transport"] = "cpu"  # else it sets 1 GiB of the GPU aside for images, which no family has
        flags += ["disable-cuda-graph"] * (not config.cuda_graphs)
    if config.kv_cache_dtype != "auto":
        if device == "cpu":
            raise EngineError(
                f"rollout.server.kv_cache_dtype={config.kv_cache_dtype} needs a GPU; on a CPU leave it at auto"
            )
        arguments["kv-cache-dtype"] = config.kv_cache_dtype
    if config.quantization != "none":
        arguments["quantization"] = config.quantization
        arguments["load-format"] = QUANTIZED_LOADER
    elif not reads_weights(config, weight_version):
        arguments["load-format"] = "dummy"
    flags += ["enable-memory-saver"] * config.memory_saver
    flags += ["enable-fp32-lm-head"] * config.fp32_lm_head
    flags += ["enable-deterministic-inference"] * config.deterministic
    given = [f"--{name}={value}" for name, value in arguments.items() if value is not None]
    return [str(python), *MODULE, *given, *(f"--{f}" for f in flags), *config.extra_args]


def guarded(command: list[str]) -> list[str]:
    """See `kind.ServerKind.guarded`."""
    python, *module = command[:3]
    assert module == MODULE
    return [python, str(keys.FOLDER / "nft_sglang_server.py"), *command[3:]]


def environment(config: ServerConfig, *, device: str, gpu: int) -> dict[str, str]:
    """See `kind.Environment`."""
    common = {"HF_HUB_OFFLINE": "1"}
    if config.memory_saver:
        common |= QUIET_HEALTH
    if device == "cpu":
        # Two threads on two busy cores are ten times slower than one.
        return common | {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
    return common
