"""Who trains what in a step: groups into optimizer steps, answers onto replicas.

Every rank computes the same plan from the same facts, so nothing has to be sent but the samples.

Invariants (tests/unit/test_schedule.py): every kept group is either trained or surplus, never both; each optimizer step
holds `questions_per_optimizer_step` groups; every answer of a trained group goes to exactly one replica; a surplus
group goes to one replica as a whole; the plan does not depend on the order of the facts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_nft.data.packing import attention_cost, balance
from megatron_nft.types import TrainingSample

SampleKey = tuple[int, int]  # (draw, sample_index)


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """What every rank knows of a group."""

    draw: int
    holder: int  # rank that holds its samples
    fate: str  # kept | all_correct | all_wrong | too_few | too_old
    step: int  # training step in which its first token was generated
    samples: tuple[tuple[int, int, int], ...] = ()  # (sample_index, tokens, response tokens) of each sample
    versions: tuple[tuple[int, int], ...] = ()  # as `made_by`; empty where all are of the step's version

    @property
    def made_by(self) -> tuple[tuple[int, int], ...]:
        """(weight version, response tokens of the samples that it made). Version 0 generates step 1."""
        return self.versions or ((self.step - 1, sum(tokens for _, _, tokens in self.samples)),)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Destinations of one training step."""

    optimizer_steps: tuple[dict[SampleKey, int], ...]  # replica of each trained answer
    response_tokens: tuple[int, ...]  # per optimizer step, over all replicas
    surplus: dict[int, int]  # draw -> replica that keeps the group for the next step
    stale: tuple[int, ...]  # draws that are too old to keep

    def destinations(self, facts: GroupFacts) -> Iterable[tuple[SampleKey, int]]:
        """(key, replica) of each of the group's samples that goes somewhere."""
        for index, _, _ in facts.samples:
            key = (facts.draw, index)
            if facts.draw in self.surplus:
                yield key, self.surplus[facts.draw]
            for part in self.optimizer_steps:
                if key in part:
                    yield key, part[key]


def plan_step(
    kept: Sequence[GroupFacts],
    *,
    step: int,
    questions_per_step: int,
    questions_per_optimizer_step: int,
    num_replicas: int,
    max_staleness: int,
    hidden_size: int,
    seed: int,
) -> StepPlan:
    """Plan one step. `kept` must hold at least `questions_per_step` groups (ValueError else).

    The oldest groups go first; the order within the step is a permutation that depends on (seed, step) alone.
    """
    if len(kept) < questions_per_step:
        raise ValueError(f"{len(kept)} groups were kept, {questions_per_step} are needed")
    ordered = sorted(kept, key=lambda g: (g.step, g.draw))
    trained, rest = ordered[:questions_per_step], ordered[questions_per_step:]
    order = np.random.default_rng([seed, step]).permutation(len(trained))
    parts, tokens = [], []
    for start in range(0, len(trained), questions_per_optimizer_step):
        groups = [trained[i] for i in order[start : start + questions_per_optimizer_step]]
        keys = [(g.draw, s[0]) for g in groups for s in g.samples]
        costs = attention_cost(np.array([s[1] for g in groups for s in g.samples], dtype=np.int64), hidden_size)
        bins = balance(costs, num_replicas)
        parts.append({keys[i]: replica for replica, members in enumerate(bins) for i in members})
        tokens.append(sum(s[2] for g in groups for s in g.samples))
    # A group generated at step s may be trained up to step s + max_staleness, the next step at the earliest.
    surplus = [g for g in rest if step + 1 - g.step <= max_staleness]
    return StepPlan(
        optimizer_steps=tuple(parts),
        response_tokens=tuple(tokens),
        surplus={g.draw: i % num_replicas for i, g in enumerate(surplus)},
        stale=tuple(g.draw for g in rest if step + 1 - g.step > max_staleness),
    )


def optimizer_steps(
    plan: StepPlan, samples: Mapping[SampleKey, TrainingSample], num_epochs: int, replica: int, *, seed: tuple[int, int]
) -> Iterator[tuple[list[TrainingSample], int, int]]:
    """The optimizer steps of a training step, epoch by epoch.

    Yields (this replica's samples, the response tokens of all replicas, the answers of all replicas).

    seed: (the run's, the step). The first epoch goes in the plan's order, each further one in an order of its own.
    """
    for epoch in range(num_epochs):
        order = np.arange(len(plan.optimizer_steps))
        if epoch:
            order = np.random.default_rng([*seed, epoch]).permutation(len(order))
        for i in order:
            mine = [samples[key] for key, at in plan.optimizer_steps[i].items() if at == replica]
            yield mine, plan.response_tokens[i], len(plan.optimizer_steps[i])
