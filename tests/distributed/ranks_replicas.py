"""Samples between ranks: from those that generated them to the replicas that train them, and into micro-batches."""

import numpy as np
import pytest
import torch.distributed as dist
from launch import Ranks, run_checks

from megatron_nft.config import PolicyConfig
from megatron_nft.distributed import gather_objects, largest, route, run_everywhere
from megatron_nft.policy import parallel
from megatron_nft.train.collect import Collected, surplus_facts
from megatron_nft.train.replicas import pack_samples, send_to_replicas
from megatron_nft.train.schedule import plan_step
from megatron_nft.types import TrainingSample

CAP, MULTIPLE = 48, 4
LAYOUTS = (
    {},
    {"tensor_model_parallel_size": 2},
    {"context_parallel_size": 2},
    {"context_parallel_size": 2, "pipeline_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2},
)


def make_sample(draw: int, index: int) -> TrainingSample:
    rng = np.random.default_rng([draw, index])
    prompt, response = (int(n) for n in rng.integers(1, 20, 2))
    zeros = np.zeros(response, np.float32)
    ids = rng.integers(0, 99, prompt + response).astype(np.int32)
    return TrainingSample(draw, index, ids, prompt, zeros, zeros, bool(index % 2), 0.5, step=1 + draw % 2)


def same(a: TrainingSample, b: TrainingSample) -> bool:
    values = ((getattr(a, name), getattr(b, name)) for name in TrainingSample.__slots__)
    return all(np.array_equal(x, y) for x, y in values)


def check_route_keeps_sender_and_order(ranks: Ranks) -> None:
    world = dist.group.WORLD
    sent = {to: [(ranks.rank, to, i, np.full(ranks.rank, i)) for i in range(ranks.rank * to)] for to in (0, 1, 3)}
    received = route(sent, world)
    me = ranks.rank
    expected = [(sender, me, i) for sender in range(4) for i in range(sender * me) if me != 2]
    assert [item[:3] for item in received] == expected
    assert all(item[3].tolist() == [item[2]] * item[0] for item in received)
    assert gather_objects(me * 10, world) == [0, 10, 20, 30]
    assert largest(5 - me, world) == 5


def check_an_error_of_one_rank_is_raised_on_all(ranks: Ranks) -> None:
    """Each message once, with the ranks that had it; an error of another kind with its type."""
    world = dist.group.WORLD

    def work() -> int:
        if ranks.rank in (1, 3):
            raise OSError("no space left")
        if ranks.rank == 2:
            raise KeyError("weight")
        return ranks.rank

    assert run_everywhere(lambda: ranks.rank, world, OSError) == ranks.rank
    for what, prefix in (("", ""), ("checkpoint of step 2", "checkpoint of step 2: ")):
        with pytest.raises(OSError) as caught:
            run_everywhere(work, world, OSError, what)
        assert str(caught.value) == f"{prefix}no space left (rank 1, 3); KeyError: 'weight' (rank 2)"
        own = (None, OSError, KeyError, OSError)[ranks.rank]
        assert caught.value.__cause__ is None if own is None else isinstance(caught.value.__cause__, own)


def check_every_sample_meets_its_replica(ranks: Ranks) -> None:
    """14 groups on four ranks, 8 of them trained: each trained answer on all ranks of one replica, surplus whole."""
    everything = {(d, i): make_sample(d, i) for d in range(14) for i in range(1 + d % 4)}
    for policy in LAYOUTS:
        layout = parallel.initialize(PolicyConfig(precision="fp32", **policy), seed=0)
        mine = {key: s for key, s in everything.items() if key[0] % ranks.world_size == ranks.rank}
        facts = [f for part in gather_objects(surplus_facts(ranks.rank, mine), layout.world_gloo) for f in part]
        plan = plan_step(
            facts,
            step=2,
            questions_per_step=8,
            questions_per_optimizer_step=4,
            num_replicas=layout.dp.size,
            max_staleness=2,
            hidden_size=8,
            seed=0,
        )
        got = send_to_replicas(Collected(facts, [], [], mine, 0), plan, layout)
        assert all(same(sample, everything[key]) for key, sample in got.items())
        held = gather_objects((layout.dp.rank, list(got)), layout.world_gloo)
        for replica in range(layout.dp.size):
            copies = [keys for at, keys in held if at == replica]
            assert len(copies) == layout.ranks_per_stage * layout.pp.size
            assert all(keys == copies[0] for keys in copies), "the ranks of a replica must hold the same, in one order"
            trained = {key for part in plan.optimizer_steps for key, at in part.items() if at == replica}
            assert set(copies[0]) == trained | {key for key in everything if plan.surplus.get(key[0]) == replica}
        leaders = [keys for at, keys in held[:: layout.ranks_per_stage][: layout.dp.size]]
        assert sorted(key for keys in leaders for key in keys) == sorted(everything), "each sample on one replica"


def check_every_rank_has_as_many_micro_batches(ranks: Ranks) -> None:
    """Replicas with very different work, one without any: equal numbers that the schedule can run, under the cap."""
    for policy in LAYOUTS:
        layout = parallel.initialize(PolicyConfig(precision="fp32", **policy), seed=0)
        for num_samples in ((1, 12, 0, 3), (0, 7, 7, 7), (0, 0, 0, 0)):
            samples = [make_sample(layout.dp.rank, i) for i in range(num_samples[layout.dp.rank])]
            segments = 2 * layout.cp.size
            multiples = {"multiple_of": MULTIPLE, "segment_multiple": segments}
            batches = pack_samples(samples, layout, max_tokens=CAP, **multiples)
            counts = set(gather_objects(len(batches), layout.world_gloo))
            assert len(counts) == 1 and min(counts) >= 1
            if layout.vpp_size:
                assert len(batches) % layout.pp.size == 0
            assert sorted(i for batch in batches for i in batch.sample_ids) == list(range(len(samples)))
            for batch in batches:
                assert batch.tokens.numel() <= CAP and batch.tokens.numel() % MULTIPLE == 0
                assert (batch.cu_seqlens % segments == 0).all()
                trained = sum(samples[i].response_length for i in batch.sample_ids)
                assert batch.loss_mask.sum().item() == trained  # a filler carries no loss


if __name__ == "__main__":
    run_checks(globals())
