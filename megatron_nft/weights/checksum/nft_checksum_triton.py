"""`nft_checksum.WordHash` on a GPU: one pass over a part's words; the program that owns a tile adds to its two sums.

With torch's operations every word would travel through memory about sixty times as a 64-bit number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024
NUM_WARPS = 4


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no types
def _mix32(  # type: ignore[no-untyped-def]  # Triton evaluates annotations, and knows only its own
    x, first: tl.constexpr, second: tl.constexpr
):
    x ^= x >> 16
    x *= tl.full((), first, tl.uint32)
    x ^= x >> 13
    x *= tl.full((), second, tl.uint32)
    return x ^ (x >> 16)


@triton.jit(  # type: ignore[untyped-decorator]  # as above
    do_not_specialize=["number", "done", "first_tile", "num_tiles"]  # one compilation serves all parts
)
def _hash_tiles(  # type: ignore[no-untyped-def]  # as above
    words,  # int32 [number] of this part
    tiles,  # int64 [2, num_tiles] of the whole tensor, added to
    number,
    done,  # words of the parts before
    first_tile,  # that has a word of this part
    num_tiles,
    SEED_A: tl.constexpr,
    SEED_B: tl.constexpr,
    POSITION_A: tl.constexpr,
    POSITION_B: tl.constexpr,
    ROTATE_A: tl.constexpr,
    ROTATE_B: tl.constexpr,
    MIX_A: tl.constexpr,
    MIX_B: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per tile."""
    tile = tl.program_id(0).to(tl.int64) + first_tile
    sum_a = tl.zeros((BLOCK,), tl.int64)
    sum_b = tl.zeros((BLOCK,), tl.int64)
    for offset in range(0, TILE, BLOCK):
        position = tile * TILE + offset + tl.arange(0, BLOCK)
        index = position - done
        inside = (index >= 0) & (index < number)
        word = tl.load(words + index, mask=inside, other=0).to(tl.uint32, bitcast=True)
        at = position.to(tl.uint32)
        turned_a = (at << ROTATE_A) | (at >> (32 - ROTATE_A))
        turned_b = (at << ROTATE_B) | (at >> (32 - ROTATE_B))
        salt_a = (at * tl.full((), POSITION_A, tl.uint32) + tl.full((), SEED_A, tl.uint32)) ^ turned_a
        salt_b = (at * tl.full((), POSITION_B, tl.uint32) + tl.full((), SEED_B, tl.uint32)) ^ turned_b
        sum_a += tl.where(inside, _mix32(word ^ salt_a, MIX_A, MIX_B).to(tl.int64), 0)
        sum_b += tl.where(inside, _mix32(word ^ salt_b, MIX_A, MIX_B).to(tl.int64), 0)
    own = tiles + tile
    tl.store(own, tl.load(own) + tl.sum(sum_a, 0))
    own += num_tiles
    tl.store(own, tl.load(own) + tl.sum(sum_b, 0))


def add_tiles(
    words: torch.Tensor,
    tiles: torch.Tensor,
    done: int,
    tile_words: int,
    *,
    seeds: tuple[int, int],
    position: tuple[int, int],
    rotate: tuple[int, int],
    mix: tuple[int, int],
) -> None:
    """Add the hashes of `words`, int32 [n], that come after `done` others, to their tiles' sums, int64 [2, tiles]."""
    if words.numel() == 0:
        return
    first, last = done // tile_words, (done + words.numel() - 1) // tile_words
    _hash_tiles[(last - first + 1,)](
        words, tiles, words.numel(), done, first, tiles.size(1), *seeds, *position, *rotate, *mix,
        TILE=tile_words, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
