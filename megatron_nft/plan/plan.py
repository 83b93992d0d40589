"""One plan: rules, memory and time of a layout; and the search over layouts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from megatron_nft.config import Config
from megatron_nft.plan import layout as layouts
from megatron_nft.plan.engine import EngineMemory, engine_problem, largest_fraction
from megatron_nft.plan.hardware import gib
from megatron_nft.plan.layout import Cluster, LayoutSettings
from megatron_nft.plan.memory import (
    DeviceMemory,
    engine_beside_trainer,
    engine_device,
    host_bytes_per_node,
    sync_bytes_beside_engine,
    trainer_memory,
)
from megatron_nft.plan.sync_time import SyncTime, sync_time
from megatron_nft.plan.timing import Workload, num_micro_batches, step_times
from megatron_nft.policy.family import ModelSpec

DAY_S = 86400


@dataclass
class Plan:
    """The result for one layout. Memory and times are empty where a rule is broken."""

    layout: LayoutSettings
    problems: list[str]
    devices: list[DeviceMemory] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    num_micro_batches: int = 0
    engine: EngineMemory | None = None
    sync: SyncTime | None = None
    host_bytes_per_node: dict[str, int] = field(default_factory=dict)
    trained_tokens: int = 0

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def step_s(self) -> float:
        return sum(self.times.values())

    @property
    def tokens_per_day(self) -> float:
        """Trained tokens per day."""
        return self.trained_tokens / self.step_s * DAY_S if self.times else 0.0

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache of one engine holds."""
        return self.engine.kv_tokens if self.engine else 0

    @property
    def fullest(self) -> DeviceMemory:
        return max(self.devices, key=lambda d: d.peak / d.capacity)


def make_plan(spec: ModelSpec, config: Config, layout: LayoutSettings, cluster: Cluster, work: Workload) -> Plan:
    """Check the rules; where they hold, calculate memory and time."""
    broken = layouts.problems(spec, config, layout, cluster)
    if broken:
        return Plan(layout, broken)
    m = num_micro_batches(work, layout, layout.dp(cluster))
    devices = trainer_memory(spec, config, layout, cluster, m)
    engines = engine_device(spec, config, layout, cluster)
    devices += [engines] if engines else []
    problems = [
        f"{d.role} needs {gib(d.peak)} in phase {d.peak_phase}, has {gib(d.capacity)} (most of it: {d.largest_part})"
        for d in devices
        if not d.fits
    ]
    engine = engine_beside_trainer(spec, config, layout, cluster)
    beside = sync_bytes_beside_engine(spec, config, layout, cluster)
    problems += [p for p in [engine_problem(config, engine, cluster.chip, beside)] if p]
    return Plan(
        layout,
        problems,
        devices,
        step_times(spec, config, layout, cluster, work),
        m,
        engine,
        sync_time(spec, config, layout, cluster),
        host_bytes_per_node(spec, config, layout, cluster),
        work.trained_tokens,
    )


def recompute_choices(
    spec: ModelSpec, config: Config, layout: LayoutSettings, cluster: Cluster, work: Workload
) -> list[Plan]:
    """The same layout with each setting of policy.recompute: what keeping more activations costs and brings."""
    return [
        make_plan(spec, config, replace(layout, recompute=recompute), cluster, work)
        for recompute in ("none", "selective", "full")
    ]


def fraction_choices(
    spec: ModelSpec, config: Config, layout: LayoutSettings, cluster: Cluster, work: Workload
) -> list[tuple[float, Plan]]:
    """The same layout with rollout.server.mem_fraction_static as it is set, and with the largest that fits, in order of
    size; empty where the engine has no such share."""
    if not config.rollout.uses_servers:
        return []
    beside = sync_bytes_beside_engine(spec, config, layout, cluster)
    engine = engine_beside_trainer(spec, config, layout, cluster)
    fractions = {config.rollout.server.mem_fraction_static, largest_fraction(config, engine, cluster.chip, beside)}
    found = []
    for fraction in sorted(fractions - {0.0}):
        server = config.rollout.server.model_copy(update={"mem_fraction_static": fraction})
        changed = config.model_copy(update={"rollout": config.rollout.model_copy(update={"server": server})})
        found.append((fraction, make_plan(spec, changed, layout, cluster, work)))
    return found


def search(spec: ModelSpec, config: Config, cluster: Cluster, work: Workload) -> list[Plan]:
    """Every layout that fits, the shortest step first."""
    found = []
    for ladder in layouts.candidates(spec, config, cluster):
        plans = (make_plan(spec, config, layout, cluster, work) for layout in ladder)
        found += [p for p in [next((p for p in plans if p.fits), None)] if p]
    return sorted(found, key=lambda p: p.step_s)


def distance(one: LayoutSettings, other: LayoutSettings) -> float:
    """How far apart two layouts are: a doubling of TP, CP, PP or EP counts 1, any other change 0.5."""
    levels = ("none", "selective", "full")
    return (
        abs(math.log2(one.tp / other.tp))
        + abs(math.log2(one.cp / other.cp))
        + abs(math.log2(one.pp / other.pp))
        + 0.5 * abs(levels.index(one.recompute) - levels.index(other.recompute))
        + abs(math.log2(one.ep / other.ep))
        + 0.5 * (one.vpp != other.vpp)
        + 0.5 * (one.offload != other.offload)
        + 0.5 * (one.micro_batch_tokens != other.micro_batch_tokens)
        + 0.1 * (one.sequence_parallel != other.sequence_parallel)
    )


@dataclass
class Neighbour:
    """A plan that fits, and the cluster that it fits on."""

    plan: Plan
    cluster: Cluster


def nearest(
    spec: ModelSpec, config: Config, layout: LayoutSettings, cluster: Cluster, work: Workload
) -> Neighbour | None:
    """The plan that fits with the fewest changes to `layout`, and the faster one of two that are equally near; if none
    fits, the nearest on 2, 4 … 64 times the nodes; None if none fits there either."""
    for factor in (1, 2, 4, 8, 16, 32, 64):
        larger = replace(cluster, nodes=cluster.nodes * factor, engine_nodes=cluster.engine_nodes * factor)
        fitting = search(spec, config, larger, work)
        if fitting:
            return Neighbour(min(fitting, key=lambda p: (distance(p.layout, layout), p.step_s)), larger)
    return None
