"""Memory for one tensor at a time that is allocated once."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch


class ReusedMemory:
    """Memory of `nbytes` that is used for one tensor at a time.

    A heap keeps the holes that large tensors of many sizes leave, so that a process's peak would depend on their order.
    """

    def __init__(self, nbytes: int) -> None:
        self._memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor with whatever values the memory holds; it takes the place of the one before.

        Its storage ends where it ends: torch.save writes whole storages.
        """
        return torch.frombuffer(self._memory, dtype=dtype, count=math.prod(shape)).view(shape)
