"""The HTTP part of a `weights.client.WeightClient`, which the engines' own clients have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import httpx
import numpy as np

from megatron_nft.engines import keys
from megatron_nft.engines.engine import EngineError
from megatron_nft.engines.reasons import reason
from megatron_nft.weights.client import ServerFacts
from megatron_nft.weights.transport import EngineLost, WeightSyncError

PromptLogprobs = Callable[[np.ndarray, str], np.ndarray]
"""(token ids int32 [L], URL of a server) -> log-probs of token_ids[1:], float32 [L - 1]. EngineError if it cannot."""


class HttpWeightClient:
    """Calls to one server, with the errors that the weight sync knows."""

    _known: ServerFacts

    def __init__(self, url: str, timeout_s: float, prompt_logprobs: PromptLogprobs, key: str | None = None) -> None:
        """timeout_s: limit for each call (sync.timeout_s). prompt_logprobs: asks the server for the probe.

        key: what the server asks for, see `engines.keys`.
        """
        self.url = url.rstrip("/")
        self._timeout_s, self._prompt_logprobs = timeout_s, prompt_logprobs
        # A proxy of the environment must not see what goes to loopback.
        self._client = httpx.Client(
            headers=keys.headers(key), trust_env=False, timeout=httpx.Timeout(timeout_s, connect=10.0)
        )

    def configure(self, facts: ServerFacts) -> None:
        """See `weights.client.WeightClient.configure`."""
        self._known = facts

    def hf_names_of(self, tensor: str, hf_names: Sequence[str]) -> list[str]:
        """See `weights.client.WeightClient.hf_names_of`. Here for servers that keep checksums under HF names."""
        return [name for name in hf_names if name == tensor]

    def prompt_logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        """See `weights.client.WeightClient.prompt_logprobs`."""
        try:
            return self._prompt_logprobs(token_ids, self.url)
        except EngineError as error:
            raise EngineLost(self.url, str(error)) from None

    def close(self) -> None:
        """See `weights.client.WeightClient.close`."""
        self._client.close()

    def _get(self, path: str) -> dict[str, Any]:
        """The JSON answer to a GET. WeightSyncError where the server refuses."""
        response = self._ask("GET", path, None)
        if response.status_code != 200:
            raise WeightSyncError(f"{self.url}{path}: HTTP {response.status_code}: {response.text[:500]}")
        return _json(response)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON answer to a POST. WeightSyncError where the server refuses."""
        return self._accepted(path, self._ask("POST", path, body))

    def _post_optional(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """The JSON answer to a POST; None where this version of the engine does not have the call."""
        response = self._ask("POST", path, body)
        return None if response.status_code == 404 else self._accepted(path, response)

    def _accepted(self, path: str, response: httpx.Response) -> dict[str, Any]:
        answer = _json(response)
        if response.status_code != 200 or answer.get("success") is False:
            text = answer.get("message") or response.text[:500]
            raise WeightSyncError(f"{self.url}{path}: HTTP {response.status_code}: {text}")
        return answer

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        try:
            return self._client.request(method, self.url + path, json=body)
        except httpx.TimeoutException:
            late = f"{path} was not answered within sync.timeout_s ({self._timeout_s:g} s)"
            raise EngineLost(self.url, late) from None
        except httpx.TransportError as error:
            raise EngineLost(self.url, f"{path}: {reason(error)}") from None


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        answer = response.json()
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}
