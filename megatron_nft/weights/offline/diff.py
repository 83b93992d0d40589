"""Two sets of weights side by side, tensor by tensor, whatever form each has."""

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
class Row:
    """One tensor of either side; None where a side lacks it."""

    name: str
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    dtypes: tuple[torch.dtype | None, torch.dtype | None]
    checksums: tuple[str | None, str | None]
    max_difference: float | None  # in fp64; None where the shapes differ or a side lacks it; NaN where only one is NaN

    @property
    def nbytes(self) -> tuple[int, int]:
        """Of either side; 0 where a side lacks it."""
        sides = zip(self.shapes, self.dtypes, strict=True)
        a, b = (0 if shape is None else math.prod(shape) * dtype.itemsize for shape, dtype in sides)
        return a, b

    @property
    def same(self) -> bool:
        """Equal bits, or equal values in different dtypes."""
        return self.max_difference == 0.0


def open_weights(path: Path) -> Source:
    """An HF folder or a Megatron checkpoint. ValueError where it is neither."""
    if any(path.glob("*.safetensors")):
        return HFFolder(path)
    checkpoint = MegatronCheckpoint(path)
    return MegatronWeights(checkpoint, checkpoint.spec())


def compare(a: Source, b: Source) -> Iterator[Row]:
    """Every tensor of both, under HF names. Held at a time: a tensor of each side."""
    for name in _union(a.shapes, b.shapes):
        values = tuple(side.read(name) if name in side else None for side in (a, b))
        yield row(name, *values)


def _union(a: Iterable[str], b: Iterable[str]) -> list[str]:
    return list(dict.fromkeys((*a, *b)))


def larger_bytes(
    a: Source | MegatronCheckpoint, b: Source | MegatronCheckpoint, names: Iterable[str] | None = None
) -> int:
    """Bytes of all tensors, or of `names`, each as on the side where it is larger."""

    def nbytes(side: Source | MegatronCheckpoint, name: str) -> int:
        return math.prod(side.shapes[name]) * side.dtypes[name].itemsize if name in side.shapes else 0

    names = _union(a.shapes, b.shapes) if names is None else names
    return sum(max(nbytes(a, name), nbytes(b, name)) for name in names)


def optimizer_keys(a: MegatronCheckpoint, b: MegatronCheckpoint) -> list[str]:
    return [key for key in _union(a.shapes, b.shapes) if key.startswith("optimizer.")]


def compare_optimizers(a: MegatronCheckpoint, b: MegatronCheckpoint) -> Iterator[Row]:
    """Optimizer states under Megatron's keys, layer by layer. Rows that pad a vocabulary are the layout's: left out."""
    sides = [(side, side.spec().vocab_size) for side in (a, b)]
    for key in optimizer_keys(a, b):
        shape = (a if key in a.shapes else b).shapes[key]
        stacked = ".layers." in key and len(shape) > 1
        for index in range(shape[0]) if stacked else [None]:
            values = tuple(_state(side, vocab_size, key, index) for side, vocab_size in sides)
            yield row(key if index is None else f"{key}[{index}]", *values)


def _state(side: MegatronCheckpoint, vocab_size: int, key: str, index: int | None) -> torch.Tensor | None:
    if key not in side.shapes:
        return None
    value = side.read(key) if index is None else side.read(key, (index,))
    return value[:vocab_size] if key.endswith((EMBEDDING, OUTPUT)) else value


def row(name: str, a: torch.Tensor | None, b: torch.Tensor | None) -> Row:
    difference = None
    if a is not None and b is not None and a.shape == b.shape:
        difference = _max_difference(a, b)
    sides = (a, b)
    return Row(
        name,
        tuple(None if t is None else tuple(t.shape) for t in sides),
        tuple(None if t is None else t.dtype for t in sides),
        tuple(None if t is None else checksum(t) for t in sides),
        difference,
    )


def _max_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| in fp64, slice by slice; equal NaNs and infinities count as equal."""
    largest = 0.0
    for x, y in zip(a.flatten().split(1 << 24), b.flatten().split(1 << 24), strict=True):
        x, y = x.double(), y.double()
        equal = (x == y) | (x.isnan() & y.isnan())
        gap = torch.where(equal, 0.0, (x - y).abs())
        if gap.isnan().any():
            return math.nan
        largest = max(largest, gap.max().item() if gap.numel() else 0.0)
    return largest
