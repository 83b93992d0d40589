"""The policy on two ranks, and alone without torchrun."""

import os
import subprocess
import sys

from launch import distributed_checks

from megatron_nft.train import launch as ranks

test_policy = distributed_checks("ranks_policy.py", world_size=2)

ALONE = """
import torch, torch.distributed as dist
from megatron_nft.config import PolicyConfig
from megatron_nft.policy import parallel
for _ in range(2):  # joining again after leaving works
    at = parallel.initialize(PolicyConfig(precision="fp32"), seed=0)
    assert (at.rank, at.world_size, at.replica_ranks) == (0, 1, ((0,),)) and at.is_replica_leader and at.is_last_stage
    total = torch.ones(1)
    dist.all_reduce(total, group=at.world_gloo)
    parallel.shutdown()
    assert not dist.is_initialized()
parallel.shutdown()
"""


LISTENING = """
import psutil
from megatron_nft.config import PolicyConfig
from megatron_nft.policy import parallel
assert parallel.initialize(PolicyConfig(precision="fp32"), seed=0).world_size == 2
listening = {c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"}
assert listening == {"127.0.0.1"}, listening
parallel.shutdown()
"""


def test_ranks_of_our_launcher_listen_on_loopback_alone() -> None:
    assert ranks.start_local([sys.executable, "-W", "ignore", "-c", LISTENING], 2) == 0


def test_one_process_needs_no_torchrun() -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    command = [sys.executable, "-W", "ignore", "-c", ALONE]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
