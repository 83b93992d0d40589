"""The simulation of `rollout_modes.py` with a plan's own numbers: a step of this run in each mode."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_nft.config import Config
from megatron_nft.plan.layout import Cluster, LayoutSettings
from megatron_nft.plan.plan import make_plan
from megatron_nft.plan.rollout_modes import Demand, Machine, ModeResult, simulate
from megatron_nft.plan.timing import Workload, decode_model, num_engines
from megatron_nft.policy.family import ModelSpec

STEPS, WARM_UP = 8, 4
COLOCATED_ONLY = "engine sleep and wake"


@dataclass(frozen=True)
class ModeTime:
    """A mode's simulated step on all nodes."""

    mode: str
    max_staleness: int
    engine_nodes: int  # nodes that hold only engines: of `overlapped`, those of the shortest step
    result: ModeResult


def mode_time(
    mode: str, spec: ModelSpec, config: Config, layout: LayoutSettings, cluster: Cluster, work: Workload
) -> ModeTime:
    """Simulate a mode. `overlapped` is tried with every number of engine nodes that the layout fits beside.

    The settings' max_staleness counts, and at least 1 where the mode needs it. ValueError where no split fits.
    """
    staleness = config.rollout.max_staleness if mode == "synchronous" else max(1, config.rollout.max_staleness)
    demand = Demand(
        questions_per_step=work.trained_questions,
        questions_per_batch=config.rollout.questions_per_batch,
        answers_per_question=work.answers_per_question,
        kept_share=work.kept_share,
        mean_response_tokens=work.mean_response_tokens,
        max_response_tokens=config.rollout.max_response_tokens,
        prompt_tokens=work.mean_prompt_tokens,
        max_staleness=staleness,
    )
    splits = [cluster]
    if mode == "overlapped":
        splits = [replace(cluster, engine_nodes=n) for n in range(1, cluster.nodes)]
    found = []
    for split in splits:
        plan = make_plan(spec, config, layout, split, work)
        if plan.problems:
            continue
        train_s = plan.step_s - plan.times["generation"] - plan.times["weight sync"]
        if split.engine_nodes:
            train_s -= plan.times.get(COLOCATED_ONLY, 0.0)
        machine = Machine(
            num_engines(config, split),
            decode_model(spec, config, layout, split, work),
            train_s,
            plan.times["weight sync"],
        )
        found.append((split.engine_nodes, machine))
    if not found:
        raise ValueError(f"rollout mode {mode}: the layout fits on no split of {cluster.nodes} nodes")
    results = [
        ModeTime(mode, staleness, nodes, simulate(mode, machine, demand, steps=STEPS, warm_up=WARM_UP))
        for nodes, machine in _promising(found, demand)
    ]
    return min(results, key=lambda time: time.result.step_s)


def _promising(splits: list[tuple[int, Machine]], demand: Demand) -> list[tuple[int, Machine]]:
    """The three splits whose slower half is fastest, if engines were always full: a simulation takes seconds."""
    answers = demand.questions_per_step / demand.kept_share * demand.answers_per_question

    def bound(split: tuple[int, Machine]) -> float:
        machine = split[1]
        rows = min(machine.model.max_rows, answers / machine.engines)
        context = rows * (demand.prompt_tokens + demand.mean_response_tokens / 2)
        tokens = answers * demand.mean_response_tokens / machine.engines
        return max(machine.train_s, tokens / rows * machine.model.step_s(rows, context)) + machine.sync_s

    return sorted(splits, key=bound)[:3]
