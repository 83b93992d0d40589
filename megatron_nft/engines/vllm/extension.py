"""Weights through our worker extension (worker/nft_vllm_extension.py): on a CPU, and where a server was started so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_nft.engines.vllm.calls import Server, refusal
from megatron_nft.weights.buckets import Bucket
from megatron_nft.weights.client import ServerFacts
from megatron_nft.weights.names import Geometry
from megatron_nft.weights.transport import HFReference, Reference
from megatron_nft.weights.transports.broadcast_group import Rendezvous


class ExtensionCalls:
    """See `calls.UpdateCalls`."""

    def __init__(self, server: Server, timeout_s: float) -> None:
        """timeout_s: for the members of a broadcast group."""
        self._server, self._timeout_s = server, timeout_s

    def facts(self) -> ServerFacts | None:
        workers = self._server.call_workers("nft_facts")
        if workers is None:
            return None
        workers = sorted(workers, key=lambda worker: worker["rank"])
        first = workers[0]
        gpus = tuple(worker["gpu"] for worker in workers if worker["gpu"])
        return ServerFacts(
            first["tp_size"],
            first["dtype"],
            first["quantization"],
            first["plain"],
            first["device"],
            first["hosts"],
            gpus=gpus,
        )

    def begin(self) -> None:
        self._call("nft_begin")

    def load_shared(self, bucket: Bucket, shares: Sequence[dict[str, Any]]) -> None:
        self._call("nft_load_shared", list(shares), _metas(bucket))

    def join(self, rendezvous: Rendezvous, rank_offset: int) -> None:
        where = (rendezvous.address, rendezvous.port, rendezvous.name, rank_offset, rendezvous.world_size)
        self._call("nft_join", *where, self._timeout_s)

    def load_broadcast(self, bucket: Bucket, group_name: str) -> None:
        self._call("nft_load_broadcast", _metas(bucket), group_name)

    def leave(self, group_name: str) -> None:
        self._call("nft_leave", group_name)

    def load_folder(self, folder: Path) -> None:
        self._call("nft_load_files", [str(path) for path in sorted(folder.glob("*.safetensors"))])

    def finish(self) -> None:
        self._call("nft_end")

    def checksums(self) -> dict[str, dict[int, str]]:
        """Of what each worker received, under HF names."""
        found: dict[str, dict[int, str]] = {}
        for worker in self._call("nft_checksums"):
            for name, value in worker["checksums"].items():
                found.setdefault(name, {})[worker["rank"]] = value
        return found

    def reference(self, geometry: Geometry) -> Reference:
        return HFReference()

    def hf_names_of(self, tensor: str, hf_names: Sequence[str]) -> list[str]:
        return [name for name in hf_names if name == tensor]

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        results = self._server.call_workers(method, *arguments)
        if results is None:  # a server at the same address was started anew, without the extension
            raise refusal(self._server.url)
        return results


def _metas(bucket: Bucket) -> list[list[Any]]:
    return [[m.name, str(m.dtype).removeprefix("torch."), list(m.shape), m.start, m.end] for m in bucket.metas]
