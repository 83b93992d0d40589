"""Checksums of tensors, the same on trainer and engine. The trainer imports this file as well as engines' workers do.

They are SGLang's, so that its /weights_checker can be asked for them: 16 hex digits over a tensor's bytes.

- tensors in host memory: the first 8 bytes of SHA-256
- tensors on a GPU: `WordHash`, a sum over hashed 32-bit words, which a GPU computes at the speed of its memory

A tensor that an engine keeps as the concatenation of several (q, k, v; gate, up; all experts) is hashed part by part.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections.abc import Iterable
from types import ModuleType

import torch

_MASK32, _MASK64 = (1 << 32) - 1, (1 << 64) - 1
MIX = (0x85EBCA6B, 0xC2B2AE35)
_TILE_WORDS = 8192
_CHUNK_WORDS = 1 << 22  # words hashed at a time: bounds the extra memory (64-bit copies) to a few hundred MB


@functools.cache
def _kernel() -> ModuleType | None:
    """Import the Triton kernel of the same sums, if Triton is there. In an engine this file belongs to no package."""
    try:
        return importlib.import_module(f"{__package__}.nft_checksum_triton" if __package__ else "nft_checksum_triton")
    except ImportError:
        return None


def _hex(value: int) -> str:
    return f"{value:016x}"


class Sha256:
    """First 8 bytes of SHA-256 over the bytes."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def update(self, part: torch.Tensor) -> None:
        """Hash the bytes of the next part, of any dtype and shape."""
        self._digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        """Return the checksum of the parts so far: 16 hex digits."""
        return self._digest.hexdigest()[:16]


class WordHash:
    """SGLang's gpu_tensor_hash, with torch operations, on whatever device the parts are.

    The bytes are 32-bit words w_i. Each is mixed with its position under two seeds, hashes are summed over tiles of
    8192 words (mod 2^32), each tile's pair of sums makes a 64-bit value, and those are summed (mod 2^64).
    Parts must be multiples of 4 bytes, except the last.
    """

    SEEDS = (0x243F6A88, ((0x243F6A88 * 0x9E3779B1) ^ 0xDEADBEEF) & _MASK32)
    POSITION = (0x27D4EB2D, 0x165667B1)
    ROTATE = (15, 13)

    def __init__(self, nbytes: int) -> None:
        """`nbytes`: of all parts together."""
        self._words = -(-nbytes // 4)
        self._done = 0
        self._tiles: torch.Tensor | None = None  # int64 [2, tiles], sums of hashed words

    def update(self, part: torch.Tensor) -> None:
        """Hash the bytes of the next part, of any dtype and shape, on the device of the first part."""
        data = part.detach().contiguous().reshape(-1).view(torch.uint8)
        if -data.numel() % 4:
            data = torch.nn.functional.pad(data, (0, -data.numel() % 4))
        tiles = self._tiles
        if tiles is None:
            tiles = torch.zeros(2, -(-self._words // _TILE_WORDS), dtype=torch.int64, device=data.device)
            self._tiles = tiles
        if data.is_cuda and (kernel := _kernel()) is not None:
            self._add_by(kernel, data.view(torch.int32))
            return
        for words in torch.split(data.view(torch.int32), _CHUNK_WORDS):
            position = torch.arange(self._done, self._done + words.numel(), device=words.device)
            for row in range(2):
                tiles[row].index_add_(0, position // _TILE_WORDS, self._hashed(words, position, row))
            self._done += words.numel()

    def _add_by(self, kernel: ModuleType, words: torch.Tensor) -> None:
        """`words`: int32, of the next part."""
        kernel.add_tiles(
            words, self._tiles, self._done, _TILE_WORDS,
            seeds=self.SEEDS, position=self.POSITION, rotate=self.ROTATE, mix=MIX,
        )  # fmt: skip
        self._done += words.numel()

    def _hashed(self, words: torch.Tensor, position: torch.Tensor, row: int) -> torch.Tensor:
        """int32 words and their int64 positions -> int64 in [0, 2^32)."""
        word, index, turn = words.to(torch.int64) & _MASK32, position & _MASK32, self.ROTATE[row]
        rotated = ((index << turn) | (index >> (32 - turn))) & _MASK32
        salt = ((_times(index, self.POSITION[row]) + self.SEEDS[row]) & _MASK32) ^ rotated
        return _mix32(word ^ salt)

    def hexdigest(self) -> str:
        """Return the checksum: 16 hex digits. RuntimeError before all parts have come."""
        if self._words == 0:
            return _hex(0)
        if self._tiles is None or self._done != self._words:
            raise RuntimeError(f"{self._done} of {self._words} words were hashed")
        sums = _mix32((self._tiles & _MASK32) ^ ((self._words * 4) & _MASK32)).tolist()
        return _hex(_splitmix64(sum((high << 32) | low for high, low in zip(*sums)) & _MASK64))


def _times(x: torch.Tensor, constant: int) -> torch.Tensor:
    """x * constant mod 2^32, for x in [0, 2^32): int64 products of that size wrap, their low 32 bits stay right."""
    return (x * constant) & _MASK32


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's 32-bit finalizer."""
    x = _times(x ^ (x >> 16), MIX[0])
    x = _times(x ^ (x >> 13), MIX[1])
    return x ^ (x >> 16)


def _splitmix64(x: int) -> int:
    """SplitMix64's finalizer."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def hasher(device: torch.device, nbytes: int) -> Sha256 | WordHash:
    """Return a new hash for a tensor of `nbytes` on `device`; feed it with `update`."""
    return WordHash(nbytes) if device.type == "cuda" else Sha256()


def checksum(tensor: torch.Tensor) -> str:
    """Return the checksum of one tensor: 16 hex digits."""
    hashed = hasher(tensor.device, tensor.nbytes)
    hashed.update(tensor)
    return hashed.hexdigest()


def checksums(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """Return the checksum of every tensor, by HF name."""
    return {name: checksum(tensor) for name, tensor in tensors}
