"""What the two ways of bringing weights into a vLLM server have in common (`extension.py`, `transfer.py`)."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_nft.engines.vllm.command import OWN_TRANSFER, WORKER_FOLDERS
from megatron_nft.weights.buckets import Bucket
from megatron_nft.weights.client import ServerFacts
from megatron_nft.weights.names import Geometry
from megatron_nft.weights.transport import Reference, WeightSyncError
from megatron_nft.weights.transports.broadcast_group import Rendezvous


class Server(Protocol):
    """Calls to one server. EngineLost where it does not answer, WeightSyncError where it refuses."""

    url: str

    def get(self, path: str) -> dict[str, Any]:
        """Return the JSON answer to a GET."""
        ...

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON answer to a POST."""
        ...

    def call_workers(self, method: str, *arguments: Any, **named: Any) -> list[Any] | None:
        """Run a method of every worker and return their results; None where the workers have no such method."""
        ...


class UpdateCalls(Protocol):
    """How weights get into the server; the methods are those of `weights.client.WeightClient`."""

    def facts(self) -> ServerFacts | None:
        """Return the server's settings; None where it was not started for these calls."""
        ...

    def begin(self) -> None: ...

    def load_shared(self, bucket: Bucket, shares: Sequence[Any]) -> None: ...

    def join(self, rendezvous: Rendezvous, rank_offset: int) -> None: ...

    def load_broadcast(self, bucket: Bucket, group_name: str) -> None: ...

    def leave(self, group_name: str) -> None: ...

    def load_folder(self, folder: Path) -> None: ...

    def finish(self) -> None:
        """Close the update; caches and the version are still the old ones."""
        ...

    def checksums(self) -> dict[str, dict[int, str]]: ...

    def reference(self, geometry: Geometry) -> Reference: ...

    def hf_names_of(self, tensor: str, hf_names: Sequence[str]) -> list[str]: ...


def refusal(url: str) -> WeightSyncError:
    """The error of a server that was started for neither way."""
    return WeightSyncError(
        f"{url} cannot take weights: start vLLM with VLLM_SERVER_DEV_MODE=1 and, on a GPU, with "
        f"{shlex.quote(OWN_TRANSFER['ipc'])} and VLLM_ALLOW_INSECURE_SERIALIZATION=1 for sync.transport=tensor, or "
        f"with {shlex.quote(OWN_TRANSFER['nccl'])} for distributed; on a CPU, with the folders "
        f"{' and '.join(map(str, WORKER_FOLDERS))} on its PYTHONPATH and "
        "--worker-extension-cls nft_vllm_extension.WeightReceiver"
    )
