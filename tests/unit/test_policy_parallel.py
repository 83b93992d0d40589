"""Groups are joined, left, and joined again in one process."""

from __future__ import annotations

import torch.distributed as dist

from megatron_nft.config import PolicyConfig
from megatron_nft.policy import parallel


def test_groups_can_be_joined_again_after_they_were_left():
    for _ in range(2):
        first = parallel.initialize(PolicyConfig(), seed=1)
        second = parallel.initialize(PolicyConfig(), seed=2)  # gives the groups of the first up
        assert (first.world_size, second.world_size) == (1, 1)
        assert dist.get_world_size(second.dp.group) == 1
        parallel.shutdown()
        assert not dist.is_initialized()
