"""Seconds of one weight sync, from bytes, buckets and the chip's rates. A model, not a measurement.

docs/weights.md ("What it costs") derives it. Legend: W bytes of weights, b buckets, N one network adapter, V a link
inside a node, H a device copy; N, V and H are data sheet rates times `Chip.bandwidth_share`, and no sync measured them.

    embedded engine    max(gather + W/N, W/H)
    tensor             max(gather + W/N, W/H + b (call + meeting)) + rest
    distributed        max(gather, W/N) + W/H + b call + rest
    disk               gather + 2 W/N + rest      written and read once; the folder's own speed is not known here

With all ranks on one host V takes the place of N. Rest: the calls that are not a bucket's, the agreements of all ranks,
and the engine's checksums, one pass over its share of W. The number of buckets is a lower bound: a parameter is never
cut, so buckets are not quite full.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_nft.config import Config
from megatron_nft.plan.architecture import expert_params, total_params
from megatron_nft.plan.layout import Cluster, LayoutSettings, element_bytes
from megatron_nft.policy.family import ModelSpec

CALL_S = 9e-3
"""An HTTP call to a server, without its bytes: benchmarks/results/weight_sync.md (TP 1, `tensor`: four calls of 128 MiB
took 198 ms, the copies in them 41 ms each), SGLang on two cores at a load of 5.6. At a load of 26 it took 107 ms
(benchmarks/results/weight_sync_terms.md), which also holds the next two."""
MEETING_S = 15.1e-3  # of a host's 8 receivers, for one bucket; at a load of 26, so an upper bound
AGREEMENT_S = 5.5e-3  # of 8 ranks; likewise

OTHER_CALLS = {"tensor": 7, "distributed": 8, "disk": 9}
"""Calls to an SGLang server in one sync, those for buckets left out, the probe included: counted in
tests/distributed/ranks_weights_peer.py."""
AGREEMENTS = 7  # of all ranks in one sync, between its phases: weights/sync.py


@dataclass(frozen=True)
class SyncTime:
    """What one sync is made of. Bytes, counts and seconds."""

    transport: str  # embedded | tensor | distributed | disk
    nbytes: int
    num_buckets: int
    gather_s: float  # shards of a stage to its leader
    spread_s: float  # the whole model to another host, or to the other GPUs where there is one host
    copy_s: float  # the engine's, out of the buckets
    calls_s: float  # of all buckets
    meetings_s: float  # likewise
    rest_s: float

    @property
    def total_s(self) -> float:
        """Seconds of the sync, with what runs side by side counted once."""
        engine_s = self.copy_s + self.calls_s + self.meetings_s
        if self.transport in ("embedded", "tensor"):
            return max(self.gather_s + self.spread_s, engine_s) + self.rest_s
        if self.transport == "distributed":
            return max(self.gather_s, self.spread_s) + engine_s + self.rest_s
        return self.gather_s + self.spread_s + self.rest_s


def sync_transport(config: Config, cluster: Cluster) -> str:
    """The transport that `sync.transport` means here: embedded | tensor | distributed | disk.

    Servers at given URLs are taken for servers on other hosts, as those of engine nodes are.
    """
    if not config.rollout.uses_servers:
        return "embedded"
    if config.sync.transport != "auto":
        return config.sync.transport
    server = config.rollout.server
    return "distributed" if cluster.engine_nodes or server.urls or server.registry else "tensor"


def _gather_s(spec: ModelSpec, config: Config, layout: LayoutSettings, cluster: Cluster) -> float:
    """Seconds until a stage's leader has its ranks' shards; stages gather side by side."""
    chip = cluster.chip
    experts = spec.num_layers * expert_params(spec)
    inside = chip.node_bandwidth * chip.bandwidth_share
    wide = layout.ep > cluster.devices_per_node
    outside = (chip.network_bandwidth if wide else chip.node_bandwidth) * chip.bandwidth_share
    ways = layout.ep if layout.ep > 1 else layout.tp  # of experts, as in `architecture.local_expert_params`
    bytes_each = element_bytes(config) / layout.pp
    dense_s = (total_params(spec) - experts) * bytes_each * (layout.tp - 1) / layout.tp / inside
    return dense_s + experts * bytes_each * (ways - 1) / ways / outside


def sync_time(spec: ModelSpec, config: Config, layout: LayoutSettings, cluster: Cluster) -> SyncTime:
    """The terms of the sync from Megatron's shards into the engines of all hosts."""
    chip, server, transport = cluster.chip, config.rollout.server, sync_transport(config, cluster)
    nbytes = total_params(spec) * element_bytes(config)
    buckets = layout.pp * math.ceil(nbytes / layout.pp / config.sync.bucket_bytes)
    one_host = cluster.nodes == 1 and transport != "distributed"
    link = (chip.node_bandwidth if one_host else chip.network_bandwidth) * chip.bandwidth_share
    memory = chip.memory_bandwidth * chip.bandwidth_share
    tp = server.tensor_parallel_size if transport != "embedded" else 1
    # On a GPU each engine rank reads from a trainer rank of its own, on a CPU all read from the caller.
    receivers = server.num_servers * tp if chip.name != "cpu" else 1
    alone = cluster.trainer_devices == 1 and transport in ("embedded", "tensor")
    streams = transport in ("tensor", "distributed")
    rest = 0.0
    if transport != "embedded":
        rest = OTHER_CALLS[transport] * CALL_S + AGREEMENTS * AGREEMENT_S + nbytes / tp / memory
    return SyncTime(
        transport=transport,
        nbytes=nbytes,
        num_buckets=buckets,
        gather_s=_gather_s(spec, config, layout, cluster),
        spread_s=0.0 if alone else nbytes / link * (2 if transport == "disk" else 1),
        copy_s=2 * nbytes / memory,  # a copied byte is read and written
        calls_s=buckets * CALL_S if streams else 0.0,
        meetings_s=buckets * MEETING_S if transport == "tensor" and receivers > 1 else 0.0,
        rest_s=rest,
    )
