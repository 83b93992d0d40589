"""SGLang: the client of its native /generate, and the command line that starts a server.

Tested with 0.5.23 on a CPU; the requests and answers used here are the same from 0.5.17 on.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np

from megatron_nft.engines.client import PROBE_TIMEOUT_S, Aborted, HttpEngine, integer_version
from megatron_nft.engines.engine import Completion, Request, SamplingParams

if TYPE_CHECKING:
    from megatron_nft.config import ServerConfig

CPU_MAX_TOTAL_TOKENS = 32768
MODEL_NAME = "policy"  # a name of our own: it stays when weights are updated
QUANTIZED_LOADER = "flash_rl"
"""Quantizes what a live update brings. SGLang's usual loader quantizes once, when the server starts, and its parameters
cannot take bf16 weights afterwards."""


class SGLangEngine(HttpEngine):
    """Client of one or several SGLang servers. SGLang's random numbers are its own: `seed_key` is not used."""

    def _generate_call(self, request: Request, sampling: SamplingParams) -> tuple[str, dict[str, Any]]:
        params = {
            "n": request.num_samples,
            "max_new_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "stop_token_ids": list(sampling.stop_token_ids) or None,
        }
        body = {"input_ids": request.prompt_ids.tolist(), "sampling_params": params, "return_logprob": True}
        return "/generate", body

    def _completions(self, answer: Any, request: Request, sampling: SamplingParams) -> list[Completion]:
        return [self._completion(sample) for sample in (answer if isinstance(answer, list) else [answer])]

    def _completion(self, sample: dict[str, Any]) -> Completion:
        meta = sample["meta_info"]
        reason = meta["finish_reason"]["type"]
        if reason == "abort":
            raise Aborted(meta["finish_reason"].get("message", ""))
        if reason not in ("stop", "length"):
            raise ValueError(f"finish reason {reason!r}")
        logprobs = np.array([entry[0] for entry in meta["output_token_logprobs"]], dtype=np.float32)
        token_ids = np.array([entry[1] for entry in meta["output_token_logprobs"]], dtype=np.int32)
        if token_ids.tolist() != sample["output_ids"]:
            raise ValueError("output_ids and output_token_logprobs are of different tokens")
        spans = tuple((integer_version(s["version"]), s["start"], s["end"]) for s in meta.get("weight_versions") or ())
        return Completion(
            token_ids, logprobs, reason, integer_version(meta["weight_version"]), spans if len(spans) > 1 else ()
        )

    def _prompt_call(self, token_ids: list[int]) -> tuple[str, dict[str, Any]]:
        params = {"max_new_tokens": 0, "temperature": 1.0}
        body = {"input_ids": token_ids, "sampling_params": params, "return_logprob": True, "logprob_start_len": 0}
        return "/generate", body

    def _prompt_logprobs(self, token_ids: list[int], answer: Any) -> list[float]:
        return [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]

    async def _version(self, client: httpx.AsyncClient, url: str) -> int:
        response = await client.get(f"{url}/model_info", timeout=PROBE_TIMEOUT_S)
        response.raise_for_status()
        return integer_version(response.json()["weight_version"])


def command_line(
    python: Path, model_path: Path, config: ServerConfig, *, device: str, dtype: str, gpu: int, weight_version: int
) -> list[str]:
    """The server's command without --port. `gpu` is the first of its GPUs; remote code stays refused (the default)."""
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
        flags += ["disable-cuda-graph"] * (not config.cuda_graphs)
    if config.quantization != "none":
        arguments["quantization"] = config.quantization
        arguments["load-format"] = QUANTIZED_LOADER
    flags += ["enable-memory-saver"] * config.memory_saver
    flags += ["enable-fp32-lm-head"] * config.fp32_lm_head
    flags += ["enable-deterministic-inference"] * config.deterministic
    given = [f"--{name}={value}" for name, value in arguments.items() if value is not None]
    return [str(python), "-m", "sglang.launch_server", *given, *(f"--{f}" for f in flags), *config.extra_args]


def environment(config: ServerConfig, *, device: str, gpu: int) -> dict[str, str]:
    """What a server needs in its environment."""
    if device == "cpu":
        # Two threads on two busy cores are ten times slower than one.
        return {"HF_HUB_OFFLINE": "1", "SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
    return {"HF_HUB_OFFLINE": "1"}


def set_version(url: str, version: int) -> None:
    """The command line has told the server already."""
