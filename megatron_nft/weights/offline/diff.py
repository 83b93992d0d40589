"""Comparing two sets of weights tensor by tensor, whatever form each has."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_nft.weights.checksum.nft_checksum import checksum
from megatron_nft.weights.hf_folder import HFFolder
from megatron_nft.weights.offline.megatron_reader import EMBEDDING, OUTPUT, MegatronCheckpoint, MegatronWeights

Source = HFFolder | MegatronWeights


@dataclass(frozen=True, slots=True)
class TensorComparison:
    """One tensor on either side; None where a side lacks it."""

    name: str
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    dtypes: tuple[torch.dtype | None, torch.dtype | None]
    checksums: tuple[str | None, str | None]
    max_difference: float | None  # in fp64; None where the shapes differ or a side lacks it; NaN where only one is NaN

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes on either side; 0 where a side lacks it."""
        left, right = (
            0 if shape is None or dtype is None else math.prod(shape) * dtype.itemsize
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        )
        return left, right

    @property
    def same(self) -> bool:
        """Whether bits are equal, or values in different dtypes."""
        return self.max_difference == 0.0


def open_weights(path: Path) -> Source:
    """Open an HF folder or a Megatron checkpoint. ValueError where it is neither."""
    if any(path.glob("*.safetensors")):
        return HFFolder(path)
    checkpoint = MegatronCheckpoint(path)
    return MegatronWeights(checkpoint, checkpoint.spec())


def compare(left: Source, right: Source) -> Iterator[TensorComparison]:
    """Compare every tensor of both, under HF names. Held at a time: a tensor of each side."""
    for name in _union(left.shapes, right.shapes):
        yield compare_tensors(
            name, left.read(name) if name in left else None, right.read(name) if name in right else None
        )


def _union(left: Iterable[str], right: Iterable[str]) -> list[str]:
    return list(dict.fromkeys((*left, *right)))


def larger_bytes(
    left: Source | MegatronCheckpoint, right: Source | MegatronCheckpoint, names: Iterable[str] | None = None
) -> int:
    """Return the bytes of all tensors, or of `names`, each as on the side where it is larger."""

    def nbytes(side: Source | MegatronCheckpoint, name: str) -> int:
        return math.prod(side.shapes[name]) * side.dtypes[name].itemsize if name in side.shapes else 0

    names = _union(left.shapes, right.shapes) if names is None else names
    return sum(max(nbytes(left, name), nbytes(right, name)) for name in names)


def optimizer_keys(left: MegatronCheckpoint, right: MegatronCheckpoint) -> list[str]:
    """Return the keys of the optimizer states of either side."""
    return [key for key in _union(left.shapes, right.shapes) if key.startswith("optimizer.")]


def compare_optimizers(left: MegatronCheckpoint, right: MegatronCheckpoint) -> Iterator[TensorComparison]:
    """Compare optimizer states under Megatron's keys, layer by layer.

    Rows that pad a vocabulary belong to the layout and are left out.
    """
    vocab_sizes = left.spec().vocab_size, right.spec().vocab_size
    for key in optimizer_keys(left, right):
        shape = (left if key in left.shapes else right).shapes[key]
        stacked = ".layers." in key and len(shape) > 1
        for index in range(shape[0]) if stacked else [None]:
            yield compare_tensors(
                key if index is None else f"{key}[{index}]",
                _state(left, vocab_sizes[0], key, index),
                _state(right, vocab_sizes[1], key, index),
            )


def _state(side: MegatronCheckpoint, vocab_size: int, key: str, index: int | None) -> torch.Tensor | None:
    if key not in side.shapes:
        return None
    value = side.read(key) if index is None else side.read(key, (index,))
    return value[:vocab_size] if key.endswith((EMBEDDING, OUTPUT)) else value


def compare_tensors(name: str, left: torch.Tensor | None, right: torch.Tensor | None) -> TensorComparison:
    """Compare two tensors of the same name; None where a side lacks it."""
    difference = None
    if left is not None and right is not None and left.shape == right.shape:
        difference = _max_difference(left, right)
    return TensorComparison(
        name,
        (None if left is None else tuple(left.shape), None if right is None else tuple(right.shape)),
        (None if left is None else left.dtype, None if right is None else right.dtype),
        (None if left is None else checksum(left), None if right is None else checksum(right)),
        difference,
    )


def _max_difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """max |left - right| in fp64, slice by slice; equal NaNs and infinities count as equal."""
    largest = 0.0
    for x, y in zip(torch.split(left.flatten(), 1 << 24), torch.split(right.flatten(), 1 << 24), strict=True):
        x, y = x.double(), y.double()
        equal = (x == y) | (x.isnan() & y.isnan())
        gap = torch.where(equal, 0.0, (x - y).abs())
        if gap.isnan().any():
            return math.nan
        largest = max(largest, gap.max().item() if gap.numel() else 0.0)
    return largest
