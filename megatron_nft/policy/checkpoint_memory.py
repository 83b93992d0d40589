"""Host memory for copies of a rank's tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SLAB_BYTES = 1 << 30
"""Memory is taken in pieces of this size: for pinned memory torch rounds every request up to a power of two."""
ALIGNMENT = 64  # bytes; a multiple of every element's size


class HostMemory:
    """Keeps its memory from one copy to the next: pinning it takes longer than filling it."""

    def __init__(self, *, pinned: bool) -> None:
        """`pinned`: locked for a GPU, which then copies without a detour."""
        self._pinned = pinned
        self._slabs: list[Tensor] = []  # uint8

    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of `tensors`, on the host and complete on return; they take the place of those made before."""
        copies, slab, at = [], 0, 0
        smallest = min(SLAB_BYTES, sum(_aligned(tensor.nbytes) for tensor in tensors))
        for tensor in tensors:
            need = _aligned(tensor.nbytes)
            while slab < len(self._slabs) and at + need > len(self._slabs[slab]):
                slab, at = slab + 1, 0
            if slab == len(self._slabs):
                self._slabs.append(torch.empty(max(need, smallest), dtype=torch.uint8, pin_memory=self._pinned))
            room = self._slabs[slab][at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copies.append(room.copy_(tensor, non_blocking=self._pinned))
            at += need
        if self._pinned:
            torch.cuda.current_stream().synchronize()
        return copies


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
