"""Receives weights inside a vLLM worker: `--worker-extension-cls nft_vllm_extension.WeightReceiver`.

vLLM mixes this class into its worker; the trainer calls the methods through POST /collective_rpc. Tensors come under
Hugging Face names and go through the model's own loader, between the two halves of vLLM's layerwise reload: without
these, `load_weights` writes into weights that were already processed for the kernels and corrupts the model.

All arguments are plain JSON. Nothing is unpickled.
"""

from __future__ import annotations

import base64
import datetime
from typing import Any

import nft_checksum
import torch
import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]  # torch exports them silently
    PrefixStore,
    Store,
    TCPStore,
)

Meta = tuple[str, str, list[int], int, int]
"""[name, dtype, shape, start, end] of a tensor in a bucket, bytes"""


class WeightReceiver:
    """Attributes of its own start with `nft_`, so that none is vLLM's."""

    # The worker's:
    device: torch.device
    rank: int
    vllm_config: Any
    model_config: Any
    model_runner: Any
    # Our own:
    nft_open: bool  # an update is under way
    nft_received: dict[str, str]  # HF name -> checksum, since nft_begin
    nft_groups: dict[str, Any]  # by name

    def nft_facts(self) -> dict[str, Any]:
        """What the trainer must know of this worker."""
        config = self.vllm_config
        return {
            "tp_size": config.parallel_config.tensor_parallel_size,
            "rank": self.rank,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "quantization": config.model_config.quantization,
            "plain": config.parallel_config.pipeline_parallel_size == config.parallel_config.data_parallel_size == 1,
            "device": self.device.type,
            "hosts": getattr(config.parallel_config, "nnodes", 1),  # older releases spread ranks by Ray alone
            "gpu": str(torch.cuda.get_device_properties(self.device).uuid) if self.device.type == "cuda" else "",
        }

    def nft_begin(self) -> bool:
        """Get ready for new weights; an update that a killed trainer left open is finished first."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        if getattr(self, "nft_open", False):
            self.nft_end()
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.model_runner.get_model())
        self.nft_open, self.nft_received = True, {}
        return True

    def nft_end(self) -> bool:
        """All weights have come: process them for the kernels."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        self.nft_open = False
        with set_current_vllm_config(self.vllm_config):
            model = self.model_runner.get_model()
            finalize_layerwise_reload(model, self.model_config)
            if self.device.type == "cpu" and getattr(self.model_config.hf_config, "tie_word_embeddings", False):
                # There a layer multiplies by a packed copy of its weight. No tensor comes for a tied head, so that the
                # reload left it with the copy of the old embedding.
                model.lm_head.quant_method.process_weights_after_loading(model.lm_head)
        self.model_runner.reset_lora_state()
        return True

    def nft_load_shared(self, memories: list[dict[str, Any]], metas: list[Meta]) -> int:
        """A bucket in the trainer's memory; one {"file": [manager, handle, bytes]} or {"cuda": {...}} per worker."""
        memory = memories[self.rank]
        flat = _cuda(memory["cuda"]) if "cuda" in memory else _shared(*memory["file"])
        count = self._nft_load(_tensors(flat, metas))
        if flat.is_cuda:
            torch.cuda.synchronize(flat.device)  # after the answer the trainer writes over the bucket
        return count

    def nft_join(self, address: str, port: int, name: str, rank_offset: int, world_size: int, timeout_s: float) -> bool:
        """Enter a broadcast group of the trainer as rank `rank_offset` + own rank; each stage leader has one."""
        timeout = datetime.timedelta(seconds=timeout_s)
        nccl = self.device.type == "cuda"
        store: Store = TCPStore(address, port, None, is_master=False, timeout=timeout)
        store = PrefixStore(f"{name}/", PrefixStore(name, store))
        store = PrefixStore("cuda/" if nccl else "cpu/", store)
        group: Any  # torch has no type for what its two kinds of group have in common
        rank = rank_offset + self.rank
        if nccl:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            group = dist.ProcessGroupNCCL(store, rank, world_size, options)
        else:
            group = dist.ProcessGroupGloo(store, rank, world_size, timeout)
        self.nft_groups = getattr(self, "nft_groups", {}) | {name: group}
        return True

    def nft_leave(self, name: str) -> bool:
        """Leave a broadcast group; nothing happens where it is not known."""
        self.nft_groups.pop(name, None)
        return True

    def nft_load_broadcast(self, metas: list[Meta], name: str) -> int:
        """A bucket that a leader broadcasts in its group."""
        flat = torch.empty(metas[-1][4], dtype=torch.uint8, device=self.device)
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self.nft_groups[name].broadcast([flat], options).wait()
        return self._nft_load(_tensors(flat, metas))

    def nft_load_files(self, paths: list[str]) -> int:
        """The tensors of safetensors files."""
        from safetensors.torch import load_file

        return sum(self._nft_load(load_file(path, device=str(self.device))) for path in paths)

    def nft_checksums(self) -> dict[str, Any]:
        """Checksums of what this worker received since nft_begin, under HF names. Its own parameters may be packed
        for the kernels, or gone: on a CPU those of linear layers are empty."""
        return {"rank": self.rank, "checksums": self.nft_received}

    def _nft_load(self, tensors: dict[str, torch.Tensor]) -> int:
        """vLLM keeps tensors of a layer until the layer is whole, so each gets memory of its own."""
        from vllm.config import set_current_vllm_config

        for name, tensor in tensors.items():
            if name in self.nft_received:
                raise ValueError(f"tensor {name}: came twice in one update")
            self.nft_received[name] = nft_checksum.checksum(tensor)
        with set_current_vllm_config(self.vllm_config):
            self.model_runner.get_model().load_weights((name, tensor.clone()) for name, tensor in tensors.items())
        return len(tensors)


def _tensors(flat: torch.Tensor, metas: list[Meta]) -> dict[str, torch.Tensor]:
    """Views of the tensors in `flat`, uint8 [bytes]."""
    found: dict[str, torch.Tensor] = {}
    for name, dtype, shape, start, end in metas:
        if name in found:
            raise ValueError(f"tensor {name}: came twice in one update")
        found[name] = flat[start:end].view(getattr(torch, dtype)).view(shape)
    return found


def _shared(manager: str, handle: str, nbytes: int) -> torch.Tensor:
    """uint8 [nbytes] of a shared-memory file of torch's. The trainer has counted this reader in."""
    storage = torch.UntypedStorage._new_shared_filename_cpu(manager.encode(), handle.encode(), nbytes)
    counted: Any = storage._shared_decref()
    return torch.empty(0, dtype=torch.uint8).set_(counted)


def _cuda(memory: dict[str, Any]) -> torch.Tensor:
    """uint8 [nbytes] of the trainer's GPU memory, by CUDA IPC."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    if memory["uuid"] not in uuids:
        raise RuntimeError(f"this worker cannot see the trainer's GPU {memory['uuid']}; it sees {', '.join(uuids)}")
    tensor: torch.Tensor = rebuild_cuda_tensor(  # type: ignore[no-untyped-call]  # torch gives it no types
        torch.Tensor,
        torch.Size([memory["nbytes"]]),
        (1,),
        memory["tensor_offset"],
        torch.UntypedStorage,
        torch.uint8,
        uuids.index(memory["uuid"]),
        base64.b64decode(memory["handle"]),
        memory["storage_bytes"],
        memory["storage_offset"],
        False,
        base64.b64decode(memory["ref_counter_handle"]),
        memory["ref_counter_offset"],
        base64.b64decode(memory["event_handle"]),
        memory["event_sync_required"],
    )
    return tensor
