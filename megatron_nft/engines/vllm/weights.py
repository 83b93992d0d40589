"""vLLM's update calls, through our worker extension (worker/nft_vllm_extension.py). Tested with 0.32.0."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_nft.engines.completions import integer_version
from megatron_nft.engines.vllm.command import WORKER_FOLDERS
from megatron_nft.engines.weight_client import HttpWeightClient
from megatron_nft.weights.buckets import Bucket
from megatron_nft.weights.client import ServerFacts
from megatron_nft.weights.names import Geometry
from megatron_nft.weights.shared_memory import shared_memory
from megatron_nft.weights.transport import HFReference, Reference, WeightSyncError
from megatron_nft.weights.transports.broadcast_group import Rendezvous

PAUSE_MODE = {"finish": "wait", "abort": "abort", "continue": "keep"}
"""sync.in_flight -> vLLM's mode. `keep` freezes requests; `end` makes them compute their KV caches anew."""


class VLLMWeightClient(HttpWeightClient):
    """See `weights.client.WeightClient`."""

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        """Run a method of the extension in every worker and return their results."""
        try:
            answer = self._post_optional("/collective_rpc", {"method": method, "args": list(arguments)})
        except WeightSyncError as error:
            if "has no attribute" not in str(error) and "not implemented" not in str(error):
                raise
            answer = None
        if answer is None:
            raise WeightSyncError(
                f"{self.url} cannot take weights: start vLLM with VLLM_SERVER_DEV_MODE=1, the folders "
                f"{' and '.join(map(str, WORKER_FOLDERS))} on its PYTHONPATH, and "
                "--worker-extension-cls nft_vllm_extension.WeightReceiver"
            )
        results: list[Any] = answer["results"]
        return results

    def facts(self) -> ServerFacts:
        workers = sorted(self._call("nft_facts"), key=lambda worker: worker["rank"])
        first = workers[0]
        gpus = tuple(worker["gpu"] for worker in workers if worker["gpu"])
        return ServerFacts(
            first["tp_size"], first["dtype"], first["quantization"], first["plain"], first["device"], gpus=gpus
        )

    def version(self) -> int:
        return integer_version(self._get("/weight_info")["weight_version"])

    def pause(self, in_flight: str) -> None:
        self._post(f"/pause?mode={PAUSE_MODE[in_flight]}", {})

    def begin(self) -> None:
        self._call("nft_begin")

    def share(self, bucket: Bucket) -> dict[str, Any]:
        return shared_memory(bucket)

    def load_shared(self, bucket: Bucket, shares: Sequence[dict[str, Any]]) -> None:
        self._call("nft_load_shared", list(shares), _metas(bucket))

    def join(self, rendezvous: Rendezvous, rank_offset: int) -> None:
        where = (rendezvous.address, rendezvous.port, rendezvous.name, rank_offset, rendezvous.world_size)
        self._call("nft_join", *where, self._timeout_s)

    def load_broadcast(self, bucket: Bucket, group_name: str) -> None:
        self._call("nft_load_broadcast", _metas(bucket), group_name)

    def leave(self, group_name: str) -> None:
        self._call("nft_leave", group_name)

    def load_folder(self, folder: Path, version: int) -> None:
        self._call("nft_load_files", [str(path) for path in sorted(folder.glob("*.safetensors"))])

    def end(self, version: int) -> None:
        self._call("nft_end")
        # Requests that were frozen give their keys and values back too, and compute them anew: while they hold them the
        # cache cannot be reset, and new requests would find prefixes of the old weights in it.
        self._post("/reset_prefix_cache?reset_running_requests=true", {})
        self._post("/update_weight_version", {"new_version": str(version)})

    def checksums(self) -> dict[str, dict[int, str]] | None:
        found: dict[str, dict[int, str]] = {}
        for worker in self._call("nft_checksums"):
            for name, value in worker["checksums"].items():
                found.setdefault(name, {})[worker["rank"]] = value
        return found

    def reference(self, geometry: Geometry) -> Reference:
        return HFReference()

    def resume(self) -> None:
        self._post("/resume", {})


def _metas(bucket: Bucket) -> list[list[Any]]:
    return [[m.name, str(m.dtype).removeprefix("torch."), list(m.shape), m.start, m.end] for m in bucket.metas]
