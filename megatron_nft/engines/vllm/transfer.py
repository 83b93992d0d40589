"""Weights through vLLM's own weight-transfer calls: on a GPU, with the server's backends `ipc` and `nccl`.

    /init_weight_transfer_engine    ipc: buckets come packed, in one piece; nccl: enter the trainer's group
    /start_weight_update            from here on tensors under Hugging Face names are collected, layer by layer
    /update_weights                 once per bucket: names, dtypes, shapes; ipc: the handles of its memory
    /finish_weight_update           what has come is processed for the kernels
    /weight_checker                 SHA-256 of each worker's own parameters, fused and cut as vLLM keeps them

vLLM has them since 0.29; what is used here is the same in 0.33. Each of its ranks looks for its own GPU among the
handles of a bucket, so all trainer ranks of the host share theirs (`ServerFacts.finds_gpu`). It is in one group at a
time, so one rank sends (`one_sender`).
Over HTTP vLLM takes handles only as a pickle, and only with VLLM_ALLOW_INSECURE_SERIALIZATION=1.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_nft.engines.shards import EngineReference, engine_name
from megatron_nft.engines.vllm.calls import Server
from megatron_nft.engines.vllm.command import OWN_TRANSFER
from megatron_nft.weights.buckets import Bucket
from megatron_nft.weights.checksum.nft_checksum import Sha256
from megatron_nft.weights.client import ServerFacts
from megatron_nft.weights.names import Geometry
from megatron_nft.weights.transport import HFReference, Reference, WeightSyncError
from megatron_nft.weights.transports.broadcast_group import Rendezvous

WHOLE_BUCKET = 1 << 62
"""Bytes; vLLM joins tensors up to this size to one broadcast. Larger than any bucket, so that each travels whole."""


class TransferCalls:
    """See `calls.UpdateCalls`."""

    def __init__(self, server: Server, facts: ServerFacts | None = None) -> None:
        self._server, self._known = server, facts
        self._is_open = False
        self._is_clean = False  # nothing of another update is left in the server

    def facts(self) -> ServerFacts | None:
        try:
            config = self._server.get("/server_info?config_format=json")["vllm_config"]
        except WeightSyncError:  # without VLLM_SERVER_DEV_MODE=1 there is no such path
            return None
        backend = (config.get("weight_transfer_config") or {}).get("backend")
        if backend not in OWN_TRANSFER:
            return None
        parallel, model = config["parallel_config"], config["model_config"]
        return ServerFacts(
            parallel["tensor_parallel_size"],
            str(model["dtype"]).removeprefix("torch."),
            model["quantization"],
            parallel["pipeline_parallel_size"] == parallel["data_parallel_size"] == 1,
            config["device_config"]["device"].partition(":")[0],
            parallel.get("nnodes", 1),
            finds_gpu=True,
            one_sender=True,
            backend=backend,
        )

    def begin(self) -> None:
        if self._backend == "ipc":
            self._post("init_weight_transfer_engine", init_info={"packed": True})
        if not self._is_clean:
            # Of an update that failed half-way the server would count tensors as this one's, and close layers that
            # this one has not filled. Ending it forgets them.
            self._start()
            self._post("finish_weight_update")
        self._start()
        self._is_open, self._is_clean = True, False

    def _start(self) -> None:
        try:
            self._post("start_weight_update")
        except WeightSyncError as error:
            if "already" not in str(error):
                raise
            self._post("finish_weight_update")  # a killed trainer left it open
            self._post("start_weight_update")

    def load_shared(self, bucket: Bucket, shares: Sequence[dict[str, Any]]) -> None:
        self._need("ipc", "tensor")
        handles = {share["cuda"]["uuid"]: _rebuilding(share["cuda"]) for share in shares}
        sizes = [m.end - m.start for m in bucket.metas]
        pickled = base64.b64encode(pickle.dumps(handles, protocol=4)).decode()
        where = {"tensor_sizes": sizes, "ipc_handles_pickled": pickled}
        self._post("update_weights", update_info=_told(bucket) | where)

    def join(self, rendezvous: Rendezvous, rank_offset: int) -> None:
        self._need("nccl", "distributed")
        group = {
            "nccl_unique_id_b64": base64.b64encode(rendezvous.unique_id()).decode(),
            "rank_offset": rank_offset,
            "world_size": rendezvous.world_size,
        }
        packing = {"packed": True, "packed_buffer_size_bytes": WHOLE_BUCKET}
        self._post("init_weight_transfer_engine", init_info=group | packing)

    def load_broadcast(self, bucket: Bucket, group_name: str) -> None:
        self._post("update_weights", update_info=_told(bucket))

    def leave(self, group_name: str) -> None:
        self._post("shutdown_weight_transfer_engine")

    def load_folder(self, folder: Path) -> None:
        """With vLLM's own reader, as an update of its own."""
        self._end()
        reader = {"load_config": {"load_format": "safetensors"}}  # that of the start may be `dummy`
        self._call("update_config", overrides=reader)
        self._call("reload_weights", weights_path=str(folder))

    def finish(self) -> None:
        self._end()
        self._is_clean = True

    def _end(self) -> None:
        if self._is_open:
            self._post("finish_weight_update")
        self._is_open = False

    def checksums(self) -> dict[str, dict[int, str]]:
        """Of the workers' own parameters; their keys are `dp0:pp0:pcp0:tp1:model.norm.weight`."""
        found: dict[str, dict[int, str]] = {}
        for key, value in self._server.post("/weight_checker", {"action": "checksum"})["checksums"].items():
            *_, rank, name = key.split(":")
            found.setdefault(name, {})[int(rank.removeprefix("tp"))] = value[:16]
        return found

    def reference(self, geometry: Geometry) -> Reference:
        known = self._known
        if known is None or not known.plain or known.quantization:
            return HFReference()
        # Kernels of mixtures of experts keep the experts in layouts of their own.
        return EngineReference(geometry, known.tp_size, lambda device, nbytes: Sha256(), experts=False)

    def hf_names_of(self, tensor: str, hf_names: Sequence[str]) -> list[str]:
        return [name for name in hf_names if engine_name(name) == tensor]

    @property
    def _backend(self) -> str:
        assert self._known is not None, "`configure` comes before all updates"
        return self._known.backend

    def _need(self, backend: str, transport: str) -> None:
        if self._backend != backend:
            raise WeightSyncError(
                f"{self._server.url}: sync.transport={transport} needs a vLLM server that was started with "
                f"{OWN_TRANSFER[backend]}; this one has the backend {self._backend}"
            )

    def _call(self, method: str, **named: Any) -> None:
        if self._server.call_workers(method, **named) is None:
            raise WeightSyncError(f"{self._server.url}: this vLLM has no {method}. Allowed here: tensor, distributed")

    def _post(self, path: str, **body: Any) -> None:
        self._server.post(f"/{path}", body)


def _told(bucket: Bucket) -> dict[str, Any]:
    return {
        "names": [m.name for m in bucket.metas],
        "dtype_names": [str(m.dtype).removeprefix("torch.") for m in bucket.metas],
        "shapes": [list(m.shape) for m in bucket.metas],
    }


def _rebuilding(memory: dict[str, Any]) -> tuple[Any, ...]:
    """Arguments of torch's `rebuild_cuda_tensor` for a bucket that `shared_memory` described, uint8 [nbytes]."""
    return (
        torch.Tensor,
        torch.Size([memory["nbytes"]]),
        (1,),
        memory["tensor_offset"],
        torch.UntypedStorage,
        torch.uint8,
        None,  # the reader puts its own device here
        base64.b64decode(memory["handle"]),
        memory["storage_bytes"],
        memory["storage_offset"],
        False,
        base64.b64decode(memory["ref_counter_handle"]),
        memory["ref_counter_offset"],
        base64.b64decode(memory["event_handle"]),
        memory["event_sync_required"],
    )
