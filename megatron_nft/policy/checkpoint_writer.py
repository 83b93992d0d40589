"""Writing torch_dist files: a rank's tensors into one file, hashed on their way, and the index of all ranks' files.

The files are what torch's FileSystemWriter writes and stock Megatron-Core reads. Here no rank asks another anything
while it writes, so a thread can do it beside the training: hashing and writing leave Python's lock free.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_nft.file_array import names_file


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of the whole model as the checkpoint lists it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """A box of a stored tensor, and the bytes of a file that hold it."""

    key: str
    offsets: tuple[int, ...]  # elements
    sizes: tuple[int, ...]
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A file that is on disk for good."""

    name: str
    nbytes: int
    sha256: str
    pieces: tuple[StoredPiece, ...]


def write_pieces(path: Path, pieces: Iterable[tuple[str, tuple[int, ...], torch.Tensor]]) -> WrittenFile:
    """Write (key, offsets in the whole tensor, values on the CPU), each as torch.save writes it, and flush to disk.

    Every tensor is written before the next one is asked for. OSError on a full disk.
    """
    places = []
    with names_file(path), path.open("wb", buffering=0) as raw:
        file = _Hashed(raw)
        for key, offsets, values in pieces:
            start = file.nbytes
            _save(_alone(values), file)
            places.append(StoredPiece(key, offsets, tuple(values.shape), start, file.nbytes - start))
        os.fsync(raw.fileno())
    return WrittenFile(path.name, file.nbytes, file.digest.hexdigest(), tuple(places))


def write_index(folder: Path, tensors: Mapping[str, StoredTensor], files: Sequence[WrittenFile], common: bytes) -> None:
    """Write what describes the `files` of all ranks: `.metadata`, common.pt (`pack_common`) and metadata.json.

    ValueError where the pieces of a tensor do not make up the whole.
    """
    chunks: dict[str, list[ChunkStorageMetadata]] = {key: [] for key in tensors}
    results = []
    for file in files:
        for piece in file.pieces:
            chunks[piece.key].append(ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes)))
        results.append([_result(file.name, piece) for piece in file.pieces])
    for key, stored in tensors.items():
        written, whole = sum(math.prod(chunk.sizes) for chunk in chunks[key]), math.prod(stored.shape)
        if written != whole:
            raise ValueError(f"{folder}: {written} elements of {key} were written, and it has {whole}")
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
        key: TensorStorageMetadata(TensorProperties(dtype=s.dtype), torch.Size(s.shape), chunks[key])
        for key, s in tensors.items()
    }
    FileSystemWriter(folder).finish(Metadata(entries), results)
    (folder / "common.pt").write_bytes(common)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


def pack_common(common: dict[str, Any]) -> bytes:
    """What is not sharded (schedule, hyper-parameters, layout), as common.pt holds it."""
    memory = io.BytesIO()
    torch.save(common, memory)
    return memory.getvalue()


def _result(name: str, piece: StoredPiece) -> WriteResult:
    index = MetadataIndex(piece.key, torch.Size(piece.offsets))
    return WriteResult(index, piece.length, _StorageInfo(name, piece.start, piece.length))


class _Hashed:
    """A file that is written from start to end, and the SHA-256 of what was written."""

    def __init__(self, file: io.RawIOBase | BinaryIO) -> None:
        self._file = file
        self.digest, self.nbytes = hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`."""
        self.digest.update(data)
        left = memoryview(data)
        self.nbytes += len(left)
        while left:
            left = left[self._file.write(left) :]  # a raw file may take less
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""


def _alone(values: torch.Tensor) -> torch.Tensor:
    """The same values in a storage that ends where they end: torch.save writes whole storages. Copies only what is not
    contiguous."""
    flat = values.detach().contiguous().view(-1).view(torch.uint8)
    return torch.from_numpy(flat.numpy()).view(values.dtype).view(values.shape)


def _save(values: torch.Tensor, file: _Hashed) -> None:
    """Call torch.save, and raise the OSError of a failed write: torch hides it behind an error of its own."""
    try:
        torch.save(values, file)  # type: ignore[arg-type]  # it asks for write and flush alone
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
