"""An engine's server as the weight sync sees it, whatever engine it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx

from megatron_nft.weights.buckets import Bucket
from megatron_nft.weights.names import Geometry
from megatron_nft.weights.transport import EngineLost, Reference, WeightSyncError
from megatron_nft.weights.transports.broadcast_group import Meeting


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What of a server's settings matters to the sync."""

    tp_size: int
    dtype: str  # float32 | bfloat16 | ... | auto
    quantization: str | None
    plain: bool  # one pipeline stage, no data parallelism
    sessions: bool = True  # updates stand between a begin and an end


class EngineServer(Protocol):
    """Blocking calls. EngineLost where the server cannot be reached, WeightSyncError where it refuses."""

    url: str
    known: ServerFacts
    """What `facts` said, on whichever rank it was asked."""

    def facts(self) -> ServerFacts: ...

    def pause(self, in_flight: str) -> None:
        """Hold new requests, and deal with those under way as `sync.in_flight` says."""

    def begin(self) -> None:
        """Open an update. One that a killed trainer left open is no obstacle."""

    def load_shared(self, bucket: Bucket, tp_size: int) -> None:
        """Load a bucket that lies in shared memory; returns when it has been read."""

    def join(self, meeting: Meeting, rank_offset: int) -> None:
        """Enter a broadcast group; returns when all members have."""

    def load_broadcast(self, bucket: Bucket, group_name: str) -> None:
        """Load a bucket that is broadcast; returns when it has been received and loaded."""

    def leave(self, group_name: str) -> None: ...

    def load_folder(self, folder: Path, version: int) -> None:
        """Load the safetensors files of a folder, within an update or as one."""

    def end(self, version: int) -> None:
        """Close the update: caches of the old weights are forgotten, answers are made under `version`."""

    def checksums(self) -> dict[str, dict[int, str]] | None:
        """Tensor -> tensor-parallel rank -> checksum, to be compared with `reference`. None where it cannot tell."""

    def reference(self, facts: ServerFacts, geometry: Geometry) -> Reference:
        """Collects the trainer's checksums in the form in which this kind of server gives its own."""

    def resume(self) -> None: ...

    def close(self) -> None: ...


class HttpServer:
    """The HTTP part of a server's client."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        # A proxy of the environment must not see what goes to loopback.
        self._client = httpx.Client(trust_env=False, timeout=httpx.Timeout(timeout_s, connect=10.0))

    def close(self) -> None:
        self._client.close()

    def get(self, path: str) -> dict[str, Any]:
        response = self._ask("GET", path, None)
        if response.status_code != 200:
            raise WeightSyncError(f"{self.url}{path}: HTTP {response.status_code}: {response.text[:500]}")
        return _json(response)

    def post(self, path: str, body: dict[str, Any], *, optional: bool = False) -> dict[str, Any] | None:
        """The JSON answer; None for an optional call that this version of the engine lacks."""
        response = self._ask("POST", path, body)
        if response.status_code == 404 and optional:
            return None
        answer = _json(response)
        if response.status_code != 200 or answer.get("success") is False:
            text = answer.get("message") or response.text[:500]
            raise WeightSyncError(f"{self.url}{path}: HTTP {response.status_code}: {text}")
        return answer

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        try:
            return self._client.request(method, self.url + path, json=body)
        except httpx.TimeoutException:
            reason = f"{path} was not answered within sync.timeout_s ({self._timeout_s:g} s)"
            raise EngineLost(self.url, reason) from None
        except httpx.TransportError as error:
            raise EngineLost(self.url, f"{path}: {error or type(error).__name__}") from None


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        answer = response.json()
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}
