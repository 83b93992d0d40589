"""What the weight sync asks of an engine's server. Engines implement it (engines/NAME/weights.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_nft.weights.buckets import Bucket
from megatron_nft.weights.names import Geometry
from megatron_nft.weights.transport import Reference
from megatron_nft.weights.transports.broadcast_group import Rendezvous


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """The settings of a server that matter to the sync."""

    tp_size: int
    dtype: str  # float32 | bfloat16 | ... | auto
    quantization: str | None
    plain: bool  # one pipeline stage, no data parallelism
    device: str = "cpu"  # or cuda
    hosts: int = 1  # that its ranks are on
    sessions: bool = True  # updates stand between a begin and an end
    finds_gpu: bool = False  # each of its ranks reads from the trainer rank on its own GPU, and finds it by itself
    one_sender: bool = False  # it is in one broadcast group at a time, of which NCCL's own id is told
    backend: str = ""  # of several kinds of update calls the one that it takes; its client knows the names
    gpus: tuple[str, ...] = field(default=(), compare=False)  # of each rank, as `routes.ServerPlace` has them


class WeightClient(Protocol):
    """Blocking calls to one server. EngineLost where it cannot be reached, WeightSyncError where it refuses."""

    url: str

    def facts(self) -> ServerFacts:
        """Ask for the server's settings."""
        ...

    def configure(self, facts: ServerFacts) -> None:
        """Take note of what `facts` returned, on whichever rank it was asked. Comes before all that follows."""
        ...

    def version(self) -> int:
        """Ask for the weight version; one that is not a number of ours is -1, as for a server that has just started."""
        ...

    def pause(self, in_flight: str) -> None:
        """Hold new requests, and treat those under way as `sync.in_flight` says."""
        ...

    def begin(self) -> None:
        """Open an update, also where a killed trainer left one open."""
        ...

    def share(self, bucket: Bucket) -> Any:
        """Return, as JSON, where one of the server's ranks finds a bucket in this process's memory. No call is made."""
        ...

    def load_shared(self, bucket: Bucket, shares: Sequence[Any]) -> None:
        """Load a bucket that lies in shared memory; returns when all of the server's ranks have read it.

        shares: of each of `Places.sources` what `share` returned there.
        """
        ...

    def join(self, rendezvous: Rendezvous, rank_offset: int) -> None:
        """Enter a broadcast group, with ranks from `rank_offset` on; returns when all members have entered."""
        ...

    def load_broadcast(self, bucket: Bucket, group_name: str) -> None:
        """Load a bucket that is broadcast; returns when it has been received and loaded."""
        ...

    def leave(self, group_name: str) -> None:
        """Leave a broadcast group."""
        ...

    def load_folder(self, folder: Path, version: int) -> None:
        """Load the safetensors files of a folder, within an update or as one."""
        ...

    def end(self, version: int) -> None:
        """Close the update: caches of the old weights are dropped, answers are made under `version`."""
        ...

    def checksums(self) -> dict[str, dict[int, str]] | None:
        """Return {tensor: {tensor-parallel rank: checksum}}, to compare with `reference`. None where it cannot tell."""
        ...

    def reference(self, geometry: Geometry) -> Reference:
        """Return a collector of the trainer's checksums in the form in which this kind of server gives its own."""
        ...

    def hf_names_of(self, tensor: str, hf_names: Sequence[str]) -> list[str]:
        """Return the HF tensors, out of `hf_names`, that the server keeps in the tensor that it calls `tensor`."""
        ...

    def resume(self) -> None:
        """Let requests go on."""
        ...

    def prompt_logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        """Return the log-probs of token_ids[1:] at temperature 1: int32 [L] -> float32 [L - 1]."""
        ...

    def close(self) -> None:
        """Close the connections."""
        ...
