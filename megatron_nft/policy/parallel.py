"""Joins the ranks and lays out tensor, context, pipeline, data and expert parallelism.

Megatron's order of ranks is tp (fastest), cp, ep, dp, pp (slowest):

    world 8, TP 2, PP 2, DP 2:   stage 0: ranks 0 1 | 2 3     stage 1: ranks 4 5 | 6 7
                                          replica 0 | replica 1         replica 0 | replica 1
    world 8, CP 2, PP 2, DP 2:   the same, where 0 and 1 hold the same weights and each half of every answer

A *replica* is the TP x CP x PP ranks that train the same micro-batches. Its leader is the first rank of its first
stage. The CP ranks of a replica hold the same weights, as the data-parallel ones do: gradients are summed, and the
optimizer's state is divided, over both.
"""

from __future__ import annotations

import datetime
import os
import socket
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from megatron_nft.config import PolicyConfig
from megatron_nft.policy import cpu
from megatron_nft.policy.connections import set_connections

LOOPBACK = "127.0.0.1"  # MASTER_ADDR of our own launcher
COLLECTIVE_TIMEOUT_S = 7200.0  # longer than the slowest rollout; the run's own watch is shorter


@dataclass(frozen=True)
class Axis:
    """This rank's place among those that differ from it in one kind of parallelism alone."""

    rank: int
    size: int
    group: dist.ProcessGroup


@dataclass(frozen=True)
class ParallelLayout:
    """This rank's place in the layout. Groups are torch process groups; on a GPU the default ones are NCCL."""

    rank: int
    world_size: int
    tp: Axis
    cp: Axis
    pp: Axis
    dp: Axis
    ep_rank: int
    ep_size: int
    vpp_size: int | None  # model chunks per pipeline rank; None without the interleaved schedule
    device: torch.device
    world_gloo: dist.ProcessGroup  # every rank, host memory
    replica_gloo: dist.ProcessGroup  # the TP x CP x PP ranks of this replica, host memory
    replica_ranks: tuple[tuple[int, ...], ...]  # [dp_size] global ranks of each replica, ascending: leader first

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank == self.pp.size - 1

    @property
    def is_replica_leader(self) -> bool:
        return self.rank == self.replica_ranks[self.dp.rank][0]

    @property
    def ranks_per_stage(self) -> int:
        """Ranks of a replica on one pipeline stage: TP x CP."""
        return self.tp.size * self.cp.size

    def round_num_micro_batches(self, count: int) -> int:
        """The next number of micro-batches, at least one, that the pipeline schedule can run."""
        multiple = self.pp.size if self.vpp_size else 1
        return max(1, -(-count // multiple)) * multiple

    @property
    def stage_leaders(self) -> tuple[int, ...]:
        """Of each pipeline stage the global rank with TP and CP rank 0 of the first replica."""
        return self.replica_ranks[0][:: self.ranks_per_stage]

    @property
    def is_stage_leader(self) -> bool:
        return self.rank in self.stage_leaders

    @property
    def last_stage_rank(self) -> int:
        """Global rank of this rank's peer (same TP, CP and DP rank) on the last pipeline stage."""
        return dist.get_global_rank(self.pp.group, self.pp.size - 1)


def initialize(policy: PolicyConfig, seed: int, collective_timeout_s: float = COLLECTIVE_TIMEOUT_S) -> ParallelLayout:
    """Join torch.distributed (torchrun's environment, or one lone process) and build Megatron's groups and RNG.

    collective_timeout_s: how long a rank waits in a collective for the others before it fails.

    May be called again with another layout of the same ranks. ValueError where the layout does not divide the world,
    and for connections to the GPU that do not suit it.
    """
    set_connections(policy)  # before anything starts CUDA
    cpu.install()
    timeout = datetime.timedelta(seconds=collective_timeout_s)
    device = _join(timeout)
    from megatron.core import parallel_state as ps

    policy.data_parallel_size(dist.get_world_size())  # raises where the layout does not divide the world
    if ps.model_parallel_is_initialized():
        _leave_groups()
    groups = dist.distributed_c10d._world.pg_map
    others = set(groups)
    ps.initialize_model_parallel(
        tensor_model_parallel_size=policy.tensor_model_parallel_size,
        pipeline_model_parallel_size=policy.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=policy.virtual_pipeline_model_parallel_size,
        context_parallel_size=policy.context_parallel_size,
        expert_model_parallel_size=policy.expert_model_parallel_size,
        expert_tensor_parallel_size=1 if policy.expert_model_parallel_size > 1 else None,
        create_gloo_process_groups=device.type == "cuda",  # without CUDA the groups are gloo anyway
        distributed_timeout_minutes=collective_timeout_s / 60,
    )
    seed_trackers(seed)
    layout = _layout(policy, device, timeout)
    _OWN_GROUPS.extend(group for group in groups if group not in others)
    return layout


def new_gloo_group(timeout_s: float) -> dist.ProcessGroup:
    """Another group of every rank for host memory, for a thread of its own. Collective."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
    return group


def seed_trackers(seed: int) -> None:
    """Seed Megatron's random states, which differ over tensor-, pipeline- and expert-parallel ranks as they must."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    with cpu.on_cpu():
        model_parallel_cuda_manual_seed(seed + 1)  # Megatron refuses seed 0


def shutdown() -> None:
    """Leave Megatron's groups and torch.distributed; safe to call when nothing was joined."""
    from megatron.core import parallel_state as ps

    if ps.model_parallel_is_initialized():
        ps.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    _OWN_GROUPS.clear()  # destroyed with the rest; a later `initialize` must not destroy them again


_OWN_GROUPS: list[dist.ProcessGroup] = []  # made by the last `initialize`


def _leave_groups() -> None:
    """Destroy the groups of the previous layout. Megatron only forgets them, and each gloo group keeps threads that
    wake up a hundred times a second: after ten layouts a rank had 1,800 of them."""
    from megatron.core import parallel_state as ps

    ps.destroy_model_parallel()
    while _OWN_GROUPS:
        dist.destroy_process_group(_OWN_GROUPS.pop())


def _join(timeout: datetime.timedelta) -> torch.device:
    on_gpu = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return device
    # Without a device_id, with which torch 2.11 and 2.13 make a new gloo group hang: ranks that are not in it enter a
    # split of NCCL's world, which is collective, and those that are in it do not.
    backend = "nccl" if on_gpu else "gloo"
    env = os.environ
    if "RANK" not in env:
        rank, world, store = 0, 1, _loopback_store(0, 0, 1)
    elif env["MASTER_ADDR"] == LOOPBACK and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
        store = _loopback_store(int(env["MASTER_PORT"]), rank, world)
    else:
        dist.init_process_group(backend, timeout=timeout)
        return device
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return device


def _loopback_store(port: int, rank: int, world: int) -> Store:
    """The store through which the ranks of this machine find each other. torch's own listens on every interface."""
    if rank != 0:
        return TCPStore(LOOPBACK, port, world, is_master=False)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((LOOPBACK, port))
    port = listener.getsockname()[1]
    return TCPStore(LOOPBACK, port, world, is_master=True, master_listen_fd=listener.detach())


def _layout(policy: PolicyConfig, device: torch.device, timeout: datetime.timedelta) -> ParallelLayout:
    from megatron.core import parallel_state as ps

    world = dist.get_world_size()
    everyone = list(range(world))
    tp, cp, pp = policy.tensor_model_parallel_size, policy.context_parallel_size, policy.pipeline_model_parallel_size
    dp_size = policy.data_parallel_size(world)
    replicas = tuple(  # rank = tp_rank + tp * (cp_rank + cp * (dp_rank + dp_size * pp_rank))
        tuple(t + tp * (c + cp * (d + dp_size * p)) for p in range(pp) for c in range(cp) for t in range(tp))
        for d in range(dp_size)
    )
    dp_rank = ps.get_data_parallel_rank()
    world_gloo = dist.new_group(everyone, backend="gloo", timeout=timeout)
    groups = [dist.new_group(list(ranks), backend="gloo", timeout=timeout) for ranks in replicas]
    if dist.get_rank() not in replicas[dp_rank]:
        raise RuntimeError(f"rank {dist.get_rank()} is not in replica {dp_rank} = {replicas[dp_rank]}")
    return ParallelLayout(
        rank=dist.get_rank(),
        world_size=world,
        tp=Axis(ps.get_tensor_model_parallel_rank(), tp, ps.get_tensor_model_parallel_group()),
        cp=Axis(ps.get_context_parallel_rank(), cp, ps.get_context_parallel_group()),
        pp=Axis(ps.get_pipeline_model_parallel_rank(), pp, ps.get_pipeline_model_parallel_group()),
        dp=Axis(dp_rank, dp_size, ps.get_data_parallel_group()),
        ep_rank=ps.get_expert_model_parallel_rank(),
        ep_size=policy.expert_model_parallel_size,
        vpp_size=policy.virtual_pipeline_model_parallel_size,
        device=device,
        world_gloo=world_gloo,
        replica_gloo=groups[dp_rank],
        replica_ranks=replicas,
    )
