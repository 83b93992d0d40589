"""A plan as text for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_nft.config import Config
from megatron_nft.plan.architecture import total_params
from megatron_nft.plan.hardware import GIB
from megatron_nft.plan.layout import Cluster
from megatron_nft.plan.memory import PARTS, DeviceMemory
from megatron_nft.plan.mode_times import ModeTime
from megatron_nft.plan.plan import Neighbour, Plan, fraction_choices, recompute_choices
from megatron_nft.plan.rollout_modes import LENGTH_SPREAD
from megatron_nft.plan.sync_time import SyncTime
from megatron_nft.plan.timing import Workload
from megatron_nft.policy.family import ModelSpec


def duration(seconds: float) -> str:
    """Seconds with three digits that matter; minutes and hours where they read better."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 120:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"


def size(count: float) -> str:
    """Bytes in GiB, or MiB below a tenth of one."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.2f} MiB"


def _memory_table(device: DeviceMemory) -> list[str]:
    phases = list(device.phases)
    lines = [f"Memory of {device.role} ({size(device.capacity)}):", f"  {'':<18}" + "".join(f"{p:>12}" for p in phases)]
    for part in PARTS:
        if any(part in device.phases[p] for p in phases):
            cells = (size(device.phases[p][part]) if part in device.phases[p] else "-" for p in phases)
            lines.append(f"  {part:<18}" + "".join(f"{c:>12}" for c in cells))
    lines.append(f"  {'total':<18}" + "".join(f"{size(device.total(p)):>12}" for p in phases))
    return lines


def _head(spec: ModelSpec, config: Config, cluster: Cluster, plan: Plan) -> list[str]:
    chip = cluster.chip
    engines = f", {cluster.engine_nodes} of them for engines" if cluster.engine_nodes else ""
    lines = [
        f"Model: {spec.family}, {total_params(spec) / 1e9:.3f} B parameters ({spec.num_layers} layers, "
        f"hidden {spec.hidden_size}, vocabulary {spec.vocab_size})",
        f"Machine: {cluster.nodes} nodes x {cluster.devices_per_node} {chip.name}{engines}",
        f"Layout: {plan.layout.describe()}",
    ]
    if plan.devices:
        dp = plan.layout.dp(cluster)
        lines.append(f"        DP {dp}, {plan.num_micro_batches} micro-batches per replica and optimizer step")
    recipe = config.policy.fp8.recipe
    return [*lines, f"Precision: {config.policy.precision}" + (f", FP8 {recipe}" if recipe != "none" else "")]


def _sync_line(sync: SyncTime) -> str:
    """Say what the time of a weight sync is made of."""
    spread = f"gather {duration(sync.gather_s)}, W/N {duration(sync.spread_s)}"
    engine = f"copies {duration(sync.copy_s)}"
    if sync.calls_s:
        engine += f", {sync.num_buckets} calls {duration(sync.calls_s)}"
    if sync.meetings_s:
        engine += f", {sync.num_buckets} meetings {duration(sync.meetings_s)}"
    made_of = {
        "embedded": f"the longer of ({spread}) and ({engine})",
        "tensor": f"the longer of ({spread}) and ({engine})",
        "distributed": f"the longer of {spread.replace(',', ' and')}, then {engine}",
        "disk": f"{spread} there and back",
    }[sync.transport]
    rest = f", and {duration(sync.rest_s)} for other calls, agreements and checksums" if sync.rest_s else ""
    return (
        f"Weight sync ({sync.transport}): {size(sync.nbytes)} in {duration(sync.total_s)}: {made_of}{rest} "
        "(megatron_nft/plan/sync_time.py)"
    )


def _time_table(plan: Plan, work: Workload) -> list[str]:
    lines = [
        "Time of one step (a model, see megatron_nft/plan/timing.py), assuming answers of "
        f"{work.mean_response_tokens} tokens on average, {work.kept_share:.0%} of the questions kept:"
    ]
    lines += [f"  {name:<24}{duration(s):>10}{s / plan.step_s:>7.0%}" for name, s in plan.times.items()]
    return [
        *lines,
        f"  {'step':<24}{duration(plan.step_s):>10}",
        *([_sync_line(plan.sync)] if plan.sync else []),
        f"Trained: {work.trained_tokens:,} tokens per step, {plan.tokens_per_day:.3g} per day",
        f"Engine's KV cache: {plan.kv_tokens:,} tokens",
    ]


def _train_bytes(plan: Plan) -> int:
    """Bytes on the fullest device while it trains."""
    return max((d.total("train") for d in plan.devices if "train" in d.phases), default=0)


def _choices(spec: ModelSpec, config: Config, cluster: Cluster, work: Workload, plan: Plan) -> list[str]:
    """Return what other values of the two settings that trade memory for time would bring."""

    def row(name: str, other: Plan, is_set: bool, cells: list[str]) -> str:
        if not other.devices:
            return f"  {name:<10}cannot run: {other.problems[0]}"
        note = "" if other.fits else "  does not fit"
        return f"  {name:<10}" + "".join(f"{c:>19}" for c in cells) + ("  (set)" if is_set else "") + note

    lines = ["What policy.recompute brings:", f"  {'':<10}{'step':>19}{'train phase':>19}"]
    for p in recompute_choices(spec, config, plan.layout, cluster, work):
        cells = [duration(p.step_s), size(_train_bytes(p))]
        lines.append(row(p.layout.recompute, p, p.layout.recompute == plan.layout.recompute, cells))
    shares = fraction_choices(spec, config, plan.layout, cluster, work)
    if shares and plan.engine:
        lines += [
            f"What rollout.server.mem_fraction_static brings ({size(plan.engine.free)} are free for the engine):",
            f"  {'':<10}{'step':>19}{'KV cache':>19}",
        ]
    for fraction, p in shares:
        cells = [duration(p.step_s), f"{p.kv_tokens:,} tokens"]
        lines.append(row(f"{fraction:g}", p, fraction == config.rollout.server.mem_fraction_static, cells))
    return lines


def as_text(
    spec: ModelSpec, config: Config, cluster: Cluster, work: Workload, plan: Plan, near: Neighbour | None
) -> str:
    """The whole report; the last lines say whether the run fits, and the nearest layout that does."""
    lines = _head(spec, config, cluster, plan)
    if plan.devices:
        shown = {d.role: d for d in [plan.fullest, *(d for d in plan.devices if d.role == "engine nodes")]}
        for device in shown.values():
            lines += ["", *_memory_table(device)]
        host = [f"{part} {size(nbytes)}" for part, nbytes in plan.host_bytes_per_node.items() if nbytes]
        if host and cluster.chip.name != "cpu":  # whose memory is the host's, and in the table
            lines.append(f"  host memory per node: {', '.join(host)}")
        lines += ["", *_time_table(plan, work), "", *_choices(spec, config, cluster, work, plan)]
    lines.append("")
    if plan.fits:
        return "\n".join([*lines, "FITS"])
    lines += ["DOES NOT FIT:", *(f"  - {p}" for p in plan.problems)]
    if near is None:
        lines.append("No layout fits, with up to 64 times the nodes: other settings or larger GPUs are needed.")
    else:
        nodes = f" (on {near.cluster.nodes} nodes)" if near.cluster != cluster else ""
        layout = near.plan.layout
        lines += [f"Nearest layout that fits{nodes}: {layout.describe()}", f"  {' '.join(layout.overrides())}"]
    return "\n".join(lines)


def search_table(plans: list[Plan], cluster: Cluster) -> str:
    """One line per layout that fits, best first."""
    if not plans:
        return "No layout fits these machines."
    head = f"{'TP':>3}{'CP':>4}{'PP':>4}{'EP':>4}{'VPP':>5}{'DP':>5}  {'recompute':<11}{'cap':>7}  {'offload':<9}"
    lines = [head + f"{'fullest':>8}{'step':>10}{'tokens/day':>12}"]
    for p in plans:
        c = p.layout
        lines.append(
            f"{c.tp:>3}{c.cp:>4}{c.pp:>4}{c.ep:>4}{c.vpp:>5}{c.dp(cluster):>5}  "
            f"{c.recompute:<11}{c.micro_batch_tokens:>7}  {'yes' if c.offload else 'no':<9}"
            f"{p.fullest.peak / p.fullest.capacity:>8.0%}{duration(p.step_s):>10}{p.tokens_per_day:>12.3g}"
        )
    return "\n".join(lines)


def plan_dict(plan: Plan, cluster: Cluster) -> dict[str, Any]:
    """A plan in plain types; bytes and seconds."""
    out: dict[str, Any] = {
        "fits": plan.fits,
        "layout": asdict(plan.layout),
        "overrides": plan.layout.overrides(),
        "problems": plan.problems,
    }
    if plan.devices:
        out |= {
            "data_parallel_size": plan.layout.dp(cluster),
            "num_micro_batches": plan.num_micro_batches,
            "memory": [
                {
                    "role": d.role,
                    "capacity_bytes": d.capacity,
                    "peak_phase": d.peak_phase,
                    "peak_bytes": d.peak,
                    "phases": {p: {"parts_bytes": parts, "total_bytes": d.total(p)} for p, parts in d.phases.items()},
                }
                for d in plan.devices
            ],
            "step_s": plan.step_s,
            "times_s": plan.times,
            "sync_bytes": plan.sync.nbytes if plan.sync else 0,
            "sync": asdict(plan.sync) if plan.sync else None,
            "host_bytes_per_node": plan.host_bytes_per_node,
            "engine_kv_tokens": plan.kv_tokens,
            "engine_free_bytes": plan.engine.free if plan.engine else None,
            "trained_tokens_per_step": plan.trained_tokens,
            "trained_tokens_per_day": plan.tokens_per_day,
        }
    return out


def _choices_dict(spec: ModelSpec, config: Config, cluster: Cluster, work: Workload, plan: Plan) -> dict[str, Any]:
    return {
        "policy.recompute": [
            {"value": p.layout.recompute, "fits": p.fits, "step_s": p.step_s, "train_bytes": _train_bytes(p)}
            for p in recompute_choices(spec, config, plan.layout, cluster, work)
        ],
        "rollout.server.mem_fraction_static": [
            {"value": fraction, "fits": p.fits, "step_s": p.step_s, "engine_kv_tokens": p.kv_tokens}
            for fraction, p in fraction_choices(spec, config, plan.layout, cluster, work)
        ],
    }


def as_dict(
    spec: ModelSpec,
    config: Config,
    cluster: Cluster,
    work: Workload,
    plan: Plan,
    near: Neighbour | None,
    found: list[Plan] | None,
) -> dict[str, Any]:
    """The report for `--json`. The key `search` is present only with `--search`."""
    out: dict[str, Any] = {
        "model": spec.to_dict() | {"total_params": total_params(spec)},
        "machine": {
            "gpu": cluster.chip.name,
            "nodes": cluster.nodes,
            "gpus_per_node": cluster.devices_per_node,
            "engine_nodes": cluster.engine_nodes,
        },
        "assumptions": asdict(work),
        "plan": plan_dict(plan, cluster),
        "choices": _choices_dict(spec, config, cluster, work, plan),
        "nearest": plan_dict(near.plan, near.cluster) | {"nodes": near.cluster.nodes} if near else None,
    }
    if found is not None:
        out["search"] = [plan_dict(p, cluster) for p in found]
    return out


def mode_table(modes: Sequence[ModeTime], work: Workload) -> str:
    """Simulated steps by mode, and how old what they train is."""
    lines = [
        f"Simulated step by rollout mode (megatron_nft/plan/rollout_modes.py), lengths log-normal with mean "
        f"{work.mean_response_tokens} and spread {LENGTH_SPREAD}:",
        f"  {'':<14}{'step':>10}{'engines idle':>14}{'trainer idle':>14}{'dropped':>9}  groups by age",
    ]
    for mode in modes:
        found = mode.result
        ages = ", ".join(f"{age}: {share:.0%}" for age, share in found.ages.items())
        nodes = f"  ({mode.engine_nodes} engine nodes)" if mode.engine_nodes else ""
        lines.append(
            f"  {mode.mode:<14}{duration(found.step_s):>10}{found.engines_idle:>14.0%}{found.trainer_idle:>14.0%}"
            f"{found.dropped:>9.1%}  {ages}, max_staleness {mode.max_staleness}{nodes}"
        )
    return "\n".join(lines)
