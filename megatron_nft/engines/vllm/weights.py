"""vLLM's update calls. Tested with 0.32.0.

There are two kinds: our worker extension's, and vLLM's own. Which one a server takes is decided by how it was started,
and found by asking it: its workers have our extension, or its settings name a backend of its own. Servers of a run have
the extension on a CPU and vLLM's own on a GPU (command.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_nft.engines.completions import integer_version
from megatron_nft.engines.vllm.calls import UpdateCalls, refusal
from megatron_nft.engines.vllm.extension import ExtensionCalls
from megatron_nft.engines.vllm.transfer import TransferCalls
from megatron_nft.engines.weight_client import HttpWeightClient
from megatron_nft.weights.buckets import Bucket
from megatron_nft.weights.client import ServerFacts
from megatron_nft.weights.names import Geometry
from megatron_nft.weights.shared_memory import shared_memory
from megatron_nft.weights.transport import Reference, WeightSyncError
from megatron_nft.weights.transports.broadcast_group import Rendezvous

PAUSE_MODE = {"finish": "wait", "abort": "abort", "continue": "keep"}
"""sync.in_flight -> vLLM's mode. `keep` freezes requests; `end` makes them compute their KV caches anew."""


class VLLMWeightClient(HttpWeightClient):
    """See `weights.client.WeightClient`."""

    _calls: UpdateCalls

    def facts(self) -> ServerFacts:
        found = ExtensionCalls(self, self._timeout_s).facts() or TransferCalls(self).facts()
        if found is None:
            raise refusal(self.url)
        return found

    def configure(self, facts: ServerFacts) -> None:
        super().configure(facts)
        self._calls = TransferCalls(self, facts) if facts.backend else ExtensionCalls(self, self._timeout_s)

    def version(self) -> int:
        return integer_version(self._get("/weight_info")["weight_version"])

    def pause(self, in_flight: str) -> None:
        self._post(f"/pause?mode={PAUSE_MODE[in_flight]}", {})

    def begin(self) -> None:
        self._calls.begin()

    def share(self, bucket: Bucket) -> dict[str, Any]:
        return shared_memory(bucket)

    def load_shared(self, bucket: Bucket, shares: Sequence[dict[str, Any]]) -> None:
        self._calls.load_shared(bucket, shares)

    def join(self, rendezvous: Rendezvous, rank_offset: int) -> None:
        self._calls.join(rendezvous, rank_offset)

    def load_broadcast(self, bucket: Bucket, group_name: str) -> None:
        self._calls.load_broadcast(bucket, group_name)

    def leave(self, group_name: str) -> None:
        self._calls.leave(group_name)

    def load_folder(self, folder: Path, version: int) -> None:
        self._calls.load_folder(folder)

    def end(self, version: int) -> None:
        self._calls.finish()
        # Requests that were frozen give their keys and values back too, and compute them anew: while they hold them the
        # cache cannot be reset, and new requests would find prefixes of the old weights in it.
        self._post("/reset_prefix_cache?reset_running_requests=true", {})
        self._post("/update_weight_version", {"new_version": str(version)})

    def checksums(self) -> dict[str, dict[int, str]] | None:
        return self._calls.checksums()

    def reference(self, geometry: Geometry) -> Reference:
        return self._calls.reference(geometry)

    def hf_names_of(self, tensor: str, hf_names: Sequence[str]) -> list[str]:
        return self._calls.hf_names_of(tensor, hf_names)

    def resume(self) -> None:
        self._post("/resume", {})

    # What `calls.Server` asks for:

    def get(self, path: str) -> dict[str, Any]:
        """See `calls.Server.get`."""
        return self._get(path)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """See `calls.Server.post`."""
        return self._post(path, body)

    def call_workers(self, method: str, *arguments: Any, **named: Any) -> list[Any] | None:
        """See `calls.Server.call_workers`."""
        body = {"method": method, "args": list(arguments), "kwargs": named}
        try:
            answer = self._post_optional("/collective_rpc", body)
        except WeightSyncError as error:
            if "has no attribute" not in str(error) and "not implemented" not in str(error):
                raise
            return None
        return None if answer is None else list(answer["results"])
