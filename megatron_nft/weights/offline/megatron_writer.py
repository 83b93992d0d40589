"""Writing a Megatron checkpoint (torch_dist) box by box from one process, as the ranks of a layout would have.

Each box is read when it is written, so that only one is held. The result is what Megatron-Core's
dist_checkpointing.load reads, in any layout.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from megatron_nft.console import SILENT, Progress
from megatron_nft.policy.family import OPTIONS, ModelSpec, division_problems
from megatron_nft.weights.file_array import names_file
from megatron_nft.weights.names import Kind, Place
from megatron_nft.weights.offline.reused_memory import ReusedMemory


@dataclass(frozen=True, slots=True)
class StoredBox:
    """A box of one stored tensor, and how to get its values."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    fill: Callable[[torch.Tensor], None]  # writes the values into a tensor [sizes], when the piece is written


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as the checkpoint lists it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class TargetLayout:
    """The layout that decides which rank's file a parameter goes to, and in which pieces."""

    tp: int
    pp: int
    vpp: int

    def stage(self, place: Place, num_layers: int) -> int:
        """Return the pipeline rank of a parameter.

        Layers go round the stages once per virtual stage; the embedding is on the first, all else on the last.
        """
        if place.layer is not None:
            return place.layer // (num_layers // (self.pp * self.vpp)) % self.pp
        return 0 if place.row.megatron[0].startswith("embedding.") else self.pp - 1

    def check(self, spec: ModelSpec) -> None:
        """Raise ValueError, with the first of `division_problems`, where the model cannot be divided so."""
        for problem in division_problems(spec, tp=self.tp, pp=self.pp, vpp=self.vpp, ep=1, names=OPTIONS):
            raise ValueError(problem)


def boxes(kind: Kind, shape: Sequence[int], tp: int) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Yield (tensor-parallel rank, offsets, sizes) of the boxes of a full Megatron parameter.

    GATE_UP: two boxes per rank, since a rank's parameter is [own gate rows | own up rows].
    """
    if kind is Kind.REPLICATED:
        yield 0, (0,) * len(shape), tuple(shape)
        return
    axis, halves = (1 if kind is Kind.ROW else 0), (2 if kind is Kind.GATE_UP else 1)
    width = shape[axis] // (tp * halves)
    for rank in range(tp):
        for half in range(halves):
            offsets, sizes = [0] * len(shape), list(shape)
            offsets[axis], sizes[axis] = (half * tp + rank) * width, width
            yield rank, tuple(offsets), tuple(sizes)


def write_checkpoint(
    folder: Path,
    stored: Mapping[str, StoredTensor],
    pieces_of_ranks: Sequence[Sequence[StoredBox]],
    common: dict[str, Any],
    progress: Progress = SILENT,
) -> None:
    """Fill `folder` with one file per rank. `progress` is told of every piece. OSError on a full disk.

    Held at a time: the largest piece. (torch's own writer holds two or more: it reads the next while one is written.)
    """
    scratch = ReusedMemory(max(_nbytes(piece, stored) for pieces in pieces_of_ranks for piece in pieces))
    written = [
        _write_rank(folder, f"__{rank}_0.distcp", pieces, stored, scratch, progress)
        for rank, pieces in enumerate(pieces_of_ranks)
    ]
    chunks: dict[str, list[ChunkStorageMetadata]] = {key: [] for key in stored}
    for piece in (piece for pieces in pieces_of_ranks for piece in pieces):
        chunks[piece.key].append(ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes)))
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
        key: TensorStorageMetadata(TensorProperties(dtype=s.dtype), torch.Size(s.shape), chunks[key])
        for key, s in stored.items()
    }
    FileSystemWriter(folder).finish(Metadata(tensors), written)  # .metadata, with the places of all pieces
    torch.save(common, folder / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


def _nbytes(piece: StoredBox, stored: Mapping[str, StoredTensor]) -> int:
    return math.prod(piece.sizes) * stored[piece.key].dtype.itemsize


def _write_rank(
    folder: Path,
    name: str,
    pieces: Sequence[StoredBox],
    stored: Mapping[str, StoredTensor],
    scratch: ReusedMemory,
    progress: Progress,
) -> list[WriteResult]:
    """Write a rank's file: its pieces in order, each as torch.save writes it; flushed to disk."""
    results = []
    with names_file(folder / name), (folder / name).open("wb") as file:
        for piece in pieces:
            value = scratch.tensor(piece.sizes, stored[piece.key].dtype)
            piece.fill(value)
            start = file.tell()
            _save(value, file)
            index = MetadataIndex(piece.key, torch.Size(piece.offsets))
            length = file.tell() - start
            results.append(WriteResult(index, length, _StorageInfo(name, start, length)))
            progress.advance(value.nbytes, piece.key)
        file.flush()
        os.fsync(file.fileno())
    return results


def _save(value: torch.Tensor, file: BinaryIO) -> None:
    """Call torch.save, and raise the OSError of a failed write: torch hides it behind an error of its own."""
    try:
        torch.save(value, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
