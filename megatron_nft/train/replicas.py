"""Samples on the data-parallel replica that trains them: sending, packing, behaviour log-probs."""

from __future__ import annotations

from megatron_nft.train.collect import Collected
from megatron_nft.data.packing import filler, pack, plan_micro_batches, unpack
from megatron_nft.distributed import largest, route
from megatron_nft.train.schedule import SampleKey, StepPlan
from megatron_nft.train.parts import Trainer
from megatron_nft.types import PackedBatch, TrainingSample


def send_to_replicas(t: Trainer, found: Collected, plan: StepPlan) -> dict[SampleKey, TrainingSample]:
    """Every sample to all ranks of its replica; returns this replica's, in the same order on each of its ranks."""
    outgoing: dict[int, list[TrainingSample]] = {r: [] for r in range(t.layout.world_size)}
    for facts in found.kept:
        if facts.holder != t.layout.rank:
            continue
        for key, replica in plan.destinations(facts):
            for rank in t.layout.replica_ranks[replica]:
                outgoing[rank].append(found.samples[key])
    received = route(outgoing, t.layout.world_gloo)
    return {(s.draw, s.sample_index): s for s in sorted(received, key=lambda s: (s.draw, s.sample_index))}


def pack_samples(t: Trainer, samples: list[TrainingSample]) -> list[PackedBatch]:
    """Micro-batches under the token cap, as many on every replica (fillers carry no loss)."""
    lengths = [len(s.input_ids) for s in samples]
    cap, multiple = t.config.policy.micro_batch_tokens, t.policy.pad_multiple
    wanted = len(plan_micro_batches(lengths, cap, multiple_of=multiple)) if samples else 0
    count = t.policy.round_num_micro_batches(largest(wanted, t.layout.world_gloo))
    plan = plan_micro_batches(lengths, cap, multiple_of=multiple, num_micro_batches=count)
    device = t.layout.device
    return [
        pack(samples, part, multiple_of=multiple, device=device) if part else filler(multiple, device) for part in plan
    ]


def compute_behaviour_logprobs(t: Trainer, samples: dict[SampleKey, TrainingSample]) -> list[TrainingSample]:
    """Log-probs of this step's kept answers, surplus included, by the weights that generated them. Returns those."""
    fresh = [s for s in samples.values() if s.behaviour_logprobs is None]
    batches = pack_samples(t, fresh)
    with t.micro_batches("log-probs", len(batches)):
        found = t.policy.compute_logprobs(batches, t.config.rollout.temperature)
    for batch, logprobs in zip(batches, found, strict=True):
        for position, values in zip(batch.sample_ids, unpack(logprobs, batch), strict=True):
            fresh[position].behaviour_logprobs = values
    return fresh
