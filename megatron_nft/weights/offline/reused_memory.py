"""Memory for one tensor at a time, taken once."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch


class ReusedMemory:
    """Tensors one after the other in the same memory. A heap keeps the holes that large tensors of many sizes leave,
    so what a process holds at its peak would depend on their order; here it is `nbytes`."""

    def __init__(self, nbytes: int) -> None:
        self._memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor with whatever values the memory holds; the one before is overwritten with it.

        Its storage ends where it ends: torch.save writes whole storages.
        """
        return torch.frombuffer(self._memory, dtype=dtype, count=math.prod(shape)).view(shape)
