"""Writing a Megatron checkpoint (torch_dist) box by box from one process, as the ranks of a layout would have.

Each box is read when it is written, so that only one is held. The result is what Megatron-Core's
dist_checkpointing.load reads, in any layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_nft.console import SILENT, Progress
from megatron_nft.policy.checkpoint_writer import StoredTensor, WrittenFile, pack_common, write_index, write_pieces
from megatron_nft.policy.family import OPTIONS, ModelSpec, division_problems
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
) -> list[WrittenFile]:
    """Fill `folder` with one file per rank, and return those. `progress` is told of every piece. OSError on a full
    disk.

    Held at a time: the largest piece. (torch's own writer holds two or more: it reads the next while one is written.)
    """
    scratch = ReusedMemory(max(_nbytes(piece, stored) for pieces in pieces_of_ranks for piece in pieces))

    def filled(pieces: Sequence[StoredBox]) -> Iterator[tuple[str, tuple[int, ...], torch.Tensor]]:
        for piece in pieces:
            value = scratch.tensor(piece.sizes, stored[piece.key].dtype)
            piece.fill(value)
            yield piece.key, piece.offsets, value
            progress.advance(value.nbytes, piece.key)

    files = [write_pieces(folder / f"__{rank}_0.distcp", filled(pieces)) for rank, pieces in enumerate(pieces_of_ranks)]
    write_index(folder, stored, files, pack_common(common))
    return files


def _nbytes(piece: StoredBox, stored: Mapping[str, StoredTensor]) -> int:
    return math.prod(piece.sizes) * stored[piece.key].dtype.itemsize
