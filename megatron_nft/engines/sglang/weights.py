"""SGLang's update endpoints, with and without update sessions.

Since 0.5.21 tensor and distributed updates stand between begin_weight_update and end_weight_update; older servers
answer 404 to both and need neither. Tested with 0.5.20 and 0.5.23.

The cache of the old weights is dropped by the update calls themselves: /flush_cache does it too, but on a CPU it runs
Python's garbage collector over the whole server, 0.3 to 1 s each time. Servers without sessions abort when an update
call finds requests under way, so for those it stays with /flush_cache.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from megatron_nft.engines.completions import integer_version
from megatron_nft.engines.shards import EngineReference, engine_name
from megatron_nft.engines.weight_client import HttpWeightClient
from megatron_nft.weights.buckets import Bucket
from megatron_nft.weights.client import ServerFacts
from megatron_nft.weights.names import Geometry
from megatron_nft.weights.shared_memory import flattened_bucket
from megatron_nft.weights.transport import HFReference, Reference, WeightSyncError
from megatron_nft.weights.transports.broadcast_group import Rendezvous

IDLE_POLL_S = 0.05
PAUSE_MODE = {"finish": "retract", "abort": "abort", "continue": "retract"}
"""sync.in_flight -> SGLang's mode. `retract` keeps what was generated and recomputes its KV cache under the new
weights; after `finish` nothing is left to retract."""


class SGLangWeightClient(HttpWeightClient):
    """See `weights.client.WeightClient`."""

    _is_open = False
    """Whether this client has an update session open; the one that controls the server opens and closes them."""

    def facts(self) -> ServerFacts:
        info = self._get("/server_info")
        plain = info.get("pp_size", 1) == 1 and info.get("dp_size", 1) == 1
        sessions = self._ask("GET", "/begin_weight_update", None).status_code != 404  # 405: only POST is allowed
        size, device = info.get("tp_size", 1), info.get("device", "cpu")
        first, step = info.get("base_gpu_id", 0), info.get("gpu_id_step", 1)
        gpus = tuple(str(first + rank * step) for rank in range(size)) if device == "cuda" else ()
        dtype, quantization = info.get("dtype", "auto"), info.get("quantization")
        hosts = info.get("nnodes", 1)
        return ServerFacts(size, dtype, quantization, plain, device, hosts, sessions, gpus=gpus)

    def version(self) -> int:
        return integer_version(self._get("/model_info")["weight_version"])

    def pause(self, in_flight: str) -> None:
        self._is_open = False
        if in_flight == "finish":
            if self._known.sessions:
                self.begin()  # not paused yet, it waits for the requests under way and holds new ones
            else:
                self._wait_idle()
        if in_flight == "continue" and not self._known.sessions:
            raise WeightSyncError(
                f"{self.url}: sync.in_flight=continue needs SGLang 0.5.21 or newer: this one forgets the KV caches of "
                "the old weights only while no request is under way. Allowed here: finish, abort"
            )
        self._post("/pause_generation", {"mode": PAUSE_MODE[in_flight]})

    def begin(self) -> None:
        if self._is_open or not self._known.sessions:
            return
        try:
            self._post("/begin_weight_update", {"selector": "all"})
        except WeightSyncError as error:
            if "already open" not in str(error):
                raise
            self._end_session()
            self._post("/begin_weight_update", {"selector": "all"})
        self._is_open = True

    def share(self, bucket: Bucket) -> str:
        return flattened_bucket(bucket)

    def load_shared(self, bucket: Bucket, shares: Sequence[str]) -> None:
        body = {
            "serialized_named_tensors": list(shares),
            "load_format": "flattened_bucket",
            "flush_cache": self._known.sessions,
        }
        self._post("/update_weights_from_tensor", body)

    def join(self, rendezvous: Rendezvous, rank_offset: int) -> None:
        body = {
            "master_address": rendezvous.address,
            "master_port": rendezvous.port,
            "rank_offset": rank_offset,
            "world_size": rendezvous.world_size,
            "group_name": rendezvous.name,
            "backend": rendezvous.backend,
        }
        self._post("/init_weights_update_group", body)

    def load_broadcast(self, bucket: Bucket, group_name: str) -> None:
        body = {
            "names": [m.name for m in bucket.metas],
            "dtypes": [str(m.dtype).removeprefix("torch.") for m in bucket.metas],
            "shapes": [list(m.shape) for m in bucket.metas],
            "group_name": group_name,
            "load_format": "flattened_bucket",
            "flush_cache": self._known.sessions,
        }
        self._post("/update_weights_from_distributed", body)

    def leave(self, group_name: str) -> None:
        self._post("/destroy_weights_update_group", {"group_name": group_name})

    def load_folder(self, folder: Path, version: int) -> None:
        self._end_session()  # a disk update is a session of its own
        body = {"model_path": str(folder), "weight_version": str(version), "flush_cache": True}
        if not self._known.quantization or self._known.sessions:
            body["load_format"] = "auto"  # else that of the start: dummy, or the first load of newer quantizing loaders
        self._post("/update_weights_from_disk", body)

    def end(self, version: int) -> None:
        self._end_session()
        if not self._known.sessions and not self._flush_cache():
            raise WeightSyncError(f"{self.url} kept KV caches of the old weights: requests are still under way")
        self._post("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})

    def checksums(self) -> dict[str, dict[int, str]] | None:
        if self._known.device == "cpu" and not self._known.sessions:  # 0.5.20 and older fail without CUDA
            return None
        answer = self._post_optional("/weights_checker", {"action": "checksum"})
        if answer is None:
            return None
        found: dict[str, dict[int, str]] = {}
        for info in answer.get("ranks", []):
            placement = info["parallelism_info"]
            rank = (placement[0] if isinstance(placement, list) else placement)["tp_rank"]
            for name, value in info["checksums"].items():
                found.setdefault(name, {})[rank] = value
        return found

    def reference(self, geometry: Geometry) -> Reference:
        known = self._known
        return EngineReference(geometry, known.tp_size) if known.plain and not known.quantization else HFReference()

    def hf_names_of(self, tensor: str, hf_names: Sequence[str]) -> list[str]:
        return [name for name in hf_names if engine_name(name) == tensor]

    def resume(self) -> None:
        self._post("/continue_generation", {})

    def _end_session(self) -> None:
        self._is_open = False
        if not self._known.sessions:
            return
        try:
            self._post("/end_weight_update", {})
        except WeightSyncError as error:
            if "no weight-update session" not in str(error):
                raise

    def _flush_cache(self) -> bool:
        """Forget KV caches; False while requests run."""
        return self._ask("POST", "/flush_cache", None).status_code == 200

    def _wait_idle(self) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not self._flush_cache():
            if time.monotonic() > deadline:
                raise WeightSyncError(
                    f"{self.url} still has requests under way after sync.timeout_s ({self._timeout_s:g} s); "
                    "raise it, or set sync.in_flight to abort or continue"
                )
            time.sleep(IDLE_POLL_S)
