"""A tensor in a file, read part by part straight into memory that the caller holds."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

BLOCK_BYTES = 256 << 10
"""Bytes read at a time where they cannot go straight to their place: for another dtype, or for columns of rows."""


@dataclass(frozen=True, slots=True)
class FileArray:
    """A row-major array of `shape` at `offset` (bytes) of a file."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def view(self, *shape: int) -> FileArray:
        """Return the same elements in another shape. ValueError where their number differs."""
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"{list(self.shape)} cannot be seen as {list(shape)}")
        return replace(self, shape=shape)

    def read_into(self, target: torch.Tensor, index: tuple[slice, ...]) -> None:
        """Fill `target`, of any dtype and strides on the CPU, with the part at `index` (start and stop of every axis).

        At most BLOCK_BYTES, or one row, are held beside `target`. ValueError where the file ends too early.
        """
        with names_file(self.path), self.path.open("rb", buffering=0) as file:
            if self.shape:
                _read(file, self, target, index)
            else:
                _read(file, self.view(1), target.view(1), (slice(0, 1),))


@contextlib.contextmanager
def names_file(path: Path) -> Iterator[None]:
    """Name the file in a failed read or write; Python's own error of an open file does not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def _read(file: io.RawIOBase, array: FileArray, target: torch.Tensor, index: tuple[slice, ...]) -> None:
    """Read the part of `array` at `index` into `target`, which has its shape."""
    rows, row_shape = index[0], array.shape[1:]
    row_bytes = math.prod(row_shape) * array.dtype.itemsize
    whole_rows = all(part == slice(0, n) for part, n in zip(index[1:], row_shape, strict=True))
    if whole_rows and target.dtype is array.dtype and target.is_contiguous():
        _fill(file, array.path, target, array.offset + rows.start * row_bytes)
    elif len(row_shape) > 1:
        for i, part in zip(range(rows.start, rows.stop), target, strict=True):
            _read(file, replace(array, offset=array.offset + i * row_bytes, shape=row_shape), part, index[1:])
    else:
        at_a_time = max(1, BLOCK_BYTES // row_bytes)
        memory = torch.empty(min(at_a_time, rows.stop - rows.start), *row_shape, dtype=array.dtype)
        for start in range(rows.start, rows.stop, at_a_time):
            stop = min(start + at_a_time, rows.stop)
            block = memory[: stop - start]
            _fill(file, array.path, block, array.offset + start * row_bytes)
            target[start - rows.start : stop - rows.start].copy_(block[:, *index[1:]])


def _fill(file: io.RawIOBase, path: Path, target: torch.Tensor, offset: int) -> None:
    """Read the bytes at `offset` into a contiguous tensor."""
    left = target.reshape(-1).view(torch.uint8).numpy().data
    file.seek(offset)
    while left:
        count = file.readinto(left)  # at most 2 GB a call
        if not count:
            raise ValueError(f"{path} is cut off: {len(left)} bytes are missing at {offset}")
        left = left[count:]
