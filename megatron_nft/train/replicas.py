"""Samples on the data-parallel replica that trains them: sending, packing, behaviour log-probs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np

from megatron_nft.algorithms import AlgorithmSettings
from megatron_nft.data.packing import pack, plan_micro_batches, unpack
from megatron_nft.distributed import gather_objects, largest, route
from megatron_nft.metrics import Mean
from megatron_nft.policy.parallel import ParallelLayout
from megatron_nft.policy.policy import Policy
from megatron_nft.train.collect import Collected
from megatron_nft.train.correction import Gap
from megatron_nft.train.lifecycle import Lifecycle
from megatron_nft.train.schedule import SampleKey, StepPlan
from megatron_nft.types import PackedBatch, TrainingSample


def send_to_replicas(found: Collected, plan: StepPlan, layout: ParallelLayout) -> dict[SampleKey, TrainingSample]:
    """Every sample to all ranks of its replica; returns this replica's, in the same order on each of its ranks.

    Collective over all ranks.
    """
    outgoing: dict[int, list[TrainingSample]] = {r: [] for r in range(layout.world_size)}
    for facts in found.kept:
        if facts.holder != layout.rank:
            continue
        for key, replica in plan.destinations(facts):
            for rank in layout.replica_ranks[replica]:
                outgoing[rank].append(found.samples[key])
    received = route(outgoing, layout.world_gloo)
    return {(s.draw, s.sample_index): s for s in sorted(received, key=lambda s: (s.draw, s.sample_index))}


def gap_of_all_ranks(samples: Sequence[TrainingSample], settings: AlgorithmSettings, layout: ParallelLayout) -> Gap:
    """The gap over the answers of all replicas, the same on every rank. Collective.

    samples: this replica's, the same on each of its ranks.
    """
    total = Gap()
    for part in gather_objects(Gap.of(samples if layout.is_replica_leader else (), settings), layout.world_gloo):
        total.add(part)
    return total


def pack_samples(
    samples: Sequence[TrainingSample],
    layout: ParallelLayout,
    *,
    max_tokens: int,
    multiple_of: int,
    segment_multiple: int = 1,
) -> list[PackedBatch]:
    """Micro-batches of at most `max_tokens` tokens, as many on every replica (fillers carry no loss). Collective.

    multiple_of, segment_multiple: what the tokens of a micro-batch and of each of its answers must be multiples of
    (`Policy.pad_multiple`, `Policy.segment_multiple`).
    """
    lengths = [len(s.input_ids) for s in samples]
    plan = partial(plan_micro_batches, lengths, max_tokens, multiple_of=multiple_of, segment_multiple=segment_multiple)
    wanted = len(plan()) if samples else 0
    count = layout.round_num_micro_batches(largest(wanted, layout.world_gloo))
    return [
        pack(samples, part, multiple_of=multiple_of, segment_multiple=segment_multiple, device=layout.device)
        for part in plan(num_micro_batches=count)
    ]


def pack_for_policy(samples: Sequence[TrainingSample], policy: Policy) -> list[PackedBatch]:
    """`pack_samples` with the policy's own limits."""
    return pack_samples(
        samples,
        policy.layout,
        max_tokens=policy.config.policy.micro_batch_tokens,
        multiple_of=policy.pad_multiple,
        segment_multiple=policy.segment_multiple,
    )


@contextmanager
def micro_batch_progress(policy: Policy, life: Lifecycle, description: str, total: int) -> Iterator[None]:
    """Show a pass of the policy over `total` micro-batches: a bar, and each of them keeps the stall watch quiet."""
    with life.progress(f"step {life.phases.step}: {description}", total) as advance:
        policy.on_micro_batch = advance
        try:
            yield
        finally:
            policy.on_micro_batch = lambda: None


def compute_behaviour_logprobs(
    policy: Policy,
    samples: dict[SampleKey, TrainingSample],
    temperature: float,
    life: Lifecycle,
    *,
    with_entropy: bool = False,
) -> tuple[list[TrainingSample], Mean]:
    """Log-probs of this step's kept answers, surplus included, by the weights that generated them.

    Returns those answers and, `with_entropy`, the entropy in nats of the policy's distribution, over this replica's
    response tokens; otherwise a mean of nothing.
    """
    fresh = [s for s in samples.values() if s.behaviour_logprobs is None]
    batches = pack_for_policy(fresh, policy)
    with micro_batch_progress(policy, life, "log-probs", len(batches)):
        if with_entropy:
            found, entropies = policy.compute_logprobs_and_entropies(batches, temperature)
        else:
            found, entropies = policy.compute_logprobs(batches, temperature), []
    for position, values in _by_sample(batches, found):
        fresh[position].behaviour_logprobs = values
    rows = [row for batch, values in zip(batches, entropies) for row in unpack(values, batch)]
    return fresh, Mean(sum(float(row.sum(dtype=np.float64)) for row in rows), sum(row.size for row in rows))


def compute_reference_logprobs(
    policy: Policy, trained: Sequence[TrainingSample], temperature: float, life: Lifecycle
) -> None:
    """Log-probs of this replica's trained answers by the moving average of the weights; nothing without an average."""
    if policy.average is None:
        return
    batches = pack_for_policy(trained, policy)
    with micro_batch_progress(policy, life, "reference log-probs", len(batches)):
        found = policy.compute_average_logprobs(batches, temperature)
    for position, values in _by_sample(batches, found):
        trained[position].reference_logprobs = values


def _by_sample(batches: Sequence[PackedBatch], found: Sequence[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """(position in what was packed, values [R]) of every sample, from the values [T] of every micro-batch."""
    for batch, values in zip(batches, found, strict=True):
        yield from zip(batch.sample_ids, unpack(values, batch), strict=True)
