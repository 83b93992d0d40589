"""The client of SGLang's native /generate.

Tested with 0.5.23 on a CPU; the requests and answers used here are the same from 0.5.17 on.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np

from megatron_nft.engines.client import PROBE_TIMEOUT_S, HttpEngine
from megatron_nft.engines.completions import integer_version
from megatron_nft.engines.engine import Completion, Request, SamplingParams
from megatron_nft.engines.sglang.weights import SGLangWeightClient

if TYPE_CHECKING:
    from megatron_nft.weights.client import WeightClient


REASONS = {"stop": "stop", "length": "length", "abort": "stopped"}


class SGLangEngine(HttpEngine):
    """Client of one or several SGLang servers. SGLang's random numbers are its own: `seed_key` is not used."""

    def _generate_call(self, request: Request, sampling: SamplingParams) -> tuple[str, dict[str, Any]]:
        params = {
            "max_new_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "stop_token_ids": list(sampling.stop_token_ids) or None,
        }
        body = {"input_ids": request.prompt_ids.tolist(), "sampling_params": params, "return_logprob": True}
        return "/generate", body

    def _completion(self, answer: Any) -> Completion:
        meta = answer["meta_info"]
        reason = REASONS[meta["finish_reason"]["type"]]
        # One that is aborted while it waits for its turn has neither.
        entries, ids = meta.get("output_token_logprobs"), answer.get("output_ids")
        if reason == "stopped":
            entries, ids = entries or [], ids or []
        logprobs = np.array([entry[0] for entry in entries], dtype=np.float32)
        token_ids = np.array([entry[1] for entry in entries], dtype=np.int32)
        if token_ids.tolist() != ids:
            raise ValueError("output_ids and output_token_logprobs are of different tokens")
        spans = tuple((integer_version(s["version"]), s["start"], s["end"]) for s in meta.get("weight_versions") or ())
        return Completion(
            token_ids, logprobs, reason, integer_version(meta["weight_version"]), spans if len(spans) > 1 else ()
        )

    def _abort_call(self) -> tuple[str, dict[str, Any]]:
        return "/abort_request", {"abort_all": True}

    def _prompt_call(self, token_ids: list[int]) -> tuple[str, dict[str, Any]]:
        params = {"max_new_tokens": 0, "temperature": 1.0}
        body = {"input_ids": token_ids, "sampling_params": params, "return_logprob": True, "logprob_start_len": 0}
        return "/generate", body

    def _prompt_logprobs(self, token_ids: list[int], answer: Any) -> list[float]:
        return [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]

    def _weight_client(self, url: str, timeout_s: float) -> WeightClient:
        return SGLangWeightClient(url, timeout_s, self.prompt_logprobs, self.key)

    async def _version(self, client: httpx.AsyncClient, url: str) -> int:
        response = await client.get(f"{url}/model_info", timeout=PROBE_TIMEOUT_S)
        response.raise_for_status()
        return integer_version(response.json()["weight_version"])

    async def _progress(self, client: httpx.AsyncClient, url: str) -> float:
        # It answers 200 once the scheduler has given any output since the question, of a request under way or, where
        # there is none, of one token of its own; 503 after 20 s without.
        response = await client.get(f"{url}/health_generate", timeout=PROBE_TIMEOUT_S)
        response.raise_for_status()
        return time.monotonic()
