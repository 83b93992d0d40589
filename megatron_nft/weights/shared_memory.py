"""Buffers that another process on this machine reads in place, and the message that tells it where.

On a CPU a buffer is a named shared-memory file, on a GPU it is device memory with a CUDA IPC handle. vLLM's worker
extension is told where it is in JSON. SGLang's update_weights_from_tensor wants a pickle (a `flattened_bucket`) that
rebuilds the tensor with torch's own functions. Nothing is ever unpickled on this side.

torch keeps a helper process (torch_shm_manager) per process that makes shared-memory files; it removes them if we
are killed. It would outlive us while an engine is connected, and keep our output open, so it is ended at exit.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import io
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from torch.multiprocessing import reductions

from megatron_nft.weights.buckets import Bucket

_files: set[str] = set()  # names of the shared-memory files that this process made
_folders: set[Path] = set()  # of torch's helper, with its socket; it leaves them behind when it is ended


def shared_buffer(nbytes: int, device: torch.device) -> torch.Tensor:
    """Allocate uint8 [nbytes] in memory that other processes of this machine can map."""
    if device.type == "cuda":
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    if not _files:
        atexit.register(clean_up)
    storage = torch.UntypedStorage._new_using_filename_cpu(nbytes)
    helper_socket, file, _ = storage._share_filename_cpu_()
    _files.add(file.decode())
    _folders.add(Path(helper_socket.decode()).parent)
    return torch.empty(0, dtype=torch.uint8).set_(storage)


class _Message(pickle.Pickler):
    """Writes tensors as references to shared memory. Each message may be read once: torch counts the readers."""

    def reducer_override(self, obj: object) -> Any:
        """Return (function, arguments) that rebuild a tensor or storage from shared memory."""
        if isinstance(obj, torch.Tensor) and obj.is_cuda:
            rebuild, arguments = _reduce_tensor(obj)
            device_index = 6  # SGLang takes the device's UUID in this place: indices differ between processes
            uuid = str(torch.cuda.get_device_properties(obj.device).uuid)
            return rebuild, (*arguments[:device_index], uuid, *arguments[device_index + 1 :])
        if isinstance(obj, torch.Tensor):
            where = (obj.storage_offset(), obj.size(), obj.stride(), False)
            storage = obj._typed_storage()  # type: ignore[no-untyped-call]  # torch gives it no types
            return reductions.rebuild_tensor, (torch.Tensor, storage, where)
        if isinstance(obj, torch.TypedStorage):
            return reductions.rebuild_typed_storage, (obj._untyped_storage, obj.dtype)
        if isinstance(obj, torch.UntypedStorage):
            manager, handle, size = _shared_file(obj)
            return reductions.rebuild_storage_filename, (torch.UntypedStorage, manager, handle, size)
        return NotImplemented


def flattened_bucket(bucket: Bucket) -> str:
    """Base64 of the message for one SGLang rank; `bucket.flat` must come from `shared_buffer`."""
    metadata = [
        SimpleNamespace(
            name=m.name,
            shape=torch.Size(m.shape),
            dtype=m.dtype,
            start_idx=m.start,
            end_idx=m.end,
            numel=m.end - m.start,
        )
        for m in bucket.metas
    ]
    written = io.BytesIO()
    _Message(written, protocol=4).dump({"flattened_tensor": bucket.flat, "metadata": metadata})
    return _text(written.getvalue())


def shared_memory(bucket: Bucket) -> dict[str, Any]:
    """Where `bucket.flat` lies, as JSON for one reader (engines/vllm/worker/nft_vllm_extension.py)."""
    flat = bucket.flat
    if not flat.is_cuda:
        manager, name, nbytes = _shared_file(flat.untyped_storage())
        return {"file": [manager.decode(), name.decode(), nbytes]}
    names = "tensor_cls size stride tensor_offset storage_cls dtype device handle storage_bytes storage_offset"
    names += " requires_grad ref_counter_handle ref_counter_offset event_handle event_sync_required"
    handle = dict(zip(names.split(), _reduce_tensor(flat)[1], strict=True))
    plain = ("tensor_offset", "storage_bytes", "storage_offset", "ref_counter_offset", "event_sync_required")
    data = ("handle", "ref_counter_handle", "event_handle")
    told = {"uuid": str(torch.cuda.get_device_properties(flat.device).uuid), "nbytes": flat.numel()}
    return {"cuda": told | {key: handle[key] for key in plain} | {key: _text(handle[key]) for key in data}}


def _reduce_tensor(tensor: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
    """Return (function, arguments) with which torch rebuilds a tensor of a GPU in another process."""
    reduced: tuple[Any, tuple[Any, ...]] = reductions.reduce_tensor(tensor)  # type: ignore[no-untyped-call]  # as above
    return reduced


def _shared_file(storage: torch.UntypedStorage) -> tuple[bytes, bytes, int]:
    """Return (helper's socket, name of the file, bytes) for one reader, which is counted in."""
    manager, handle, nbytes = storage._share_filename_cpu_()
    storage._shared_incref()  # type: ignore[no-untyped-call]  # as above; the reader takes it back
    return manager, handle, nbytes


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def clean_up() -> None:
    """Remove our files, torch's helper and its folder, at exit or before. Ends no process but a child of ours."""
    for name in _files:
        with contextlib.suppress(FileNotFoundError):  # torch has removed it with its tensor
            os.unlink("/dev/shm" + name)
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
            if child.name() == "torch_shm_manager":
                child.terminate()
                child.wait(timeout=5)
    for folder in _folders:
        shutil.rmtree(folder, ignore_errors=True)
