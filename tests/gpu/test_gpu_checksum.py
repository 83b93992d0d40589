"""The checksum kernel, compiled, gives what torch's operations give on the host."""

from __future__ import annotations

import pytest
import torch

from megatron_nft.weights.checksum import nft_checksum

pytestmark = pytest.mark.needs("cuda")


@pytest.mark.parametrize("sizes", [[1], [5], [40002], [7002, 2, 998, 16384, 100_000, 3]])
def test_parts_of_a_tensor(sizes):
    generator = torch.Generator().manual_seed(len(sizes))
    parts = [torch.randn(n, generator=generator).to(torch.bfloat16) for n in sizes]
    assert nft_checksum._kernel() is not None
    found = []
    for device in ("cpu", "cuda"):
        hashed = nft_checksum.WordHash(sum(p.nbytes for p in parts))
        for part in parts:
            hashed.update(part.to(device))
        found.append(hashed.hexdigest())
    assert found[0] == found[1]


def test_a_changed_word_is_seen():
    tensor = torch.randn(1000, 1000, device="cuda", dtype=torch.bfloat16)
    before = nft_checksum.checksum(tensor)
    assert nft_checksum.checksum(tensor.clone()) == before
    tensor[999, 999] += 1
    assert nft_checksum.checksum(tensor) != before
