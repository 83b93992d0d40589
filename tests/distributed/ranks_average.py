"""The moving average of the weights: the same in every layout, out of the training's way, saved and loaded."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import Ranks, run_checks
from policies import TEMPERATURE, UNEVEN, deal, loss, make_policy, make_reference, samples, step

from megatron_nft.data.packing import pack
from megatron_nft.distributed import gather_objects
from megatron_nft.policy.checkpoint import load_sharded, save_sharded
from megatron_nft.policy.policy import Policy

DECAY = 0.75
AVERAGE = {"reference": "ema", "reference_decay": DECAY}
TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
LAYOUTS = {
    "DP4": {},
    "DP4, several buckets": {"overlap_grad_reduce": True},
    "DP4, optimizer whole": {"use_distributed_optimizer": False},
    "TP2 DP2": {TP: 2, "sequence_parallel": True},
    "PP2 DP2": {PP: 2},
    "TP2 PP2": {TP: 2, PP: 2},
    "TP2 PP2, optimizer whole": {TP: 2, PP: 2, "use_distributed_optimizer": False},
    "PP2 VPP2": {PP: 2, "virtual_pipeline_model_parallel_size": 2},
}


def make(ranks: Ranks, family: str = "qwen2", *, average: bool = True, load: bool = True, **policy: object) -> Policy:
    model = make_reference(ranks, family, tied=family == "qwen2").model
    return make_policy(model, load=load, algorithm=AVERAGE if average else None, **policy)


def weights(policy: Policy) -> list[torch.Tensor]:
    return [p.detach().clone() for chunk in policy.chunks for p in chunk.parameters()]


def masters(policy: Policy) -> list[torch.Tensor]:
    """The fp32 weights of this rank's ranges, in float64."""
    return [own.master.double() for own in policy.average.ranges]


def reference_logprobs(policy: Policy) -> np.ndarray:
    """Of all eight answers by the average, float32 [8, T], the same on every rank."""
    return gathered(policy, policy.compute_average_logprobs)


def gathered(policy: Policy, compute: Callable[..., list[np.ndarray]]) -> np.ndarray:
    """`compute` of the uneven split, in its order and without padding, whatever replica had a micro-batch: [tokens]."""
    at, found = policy.layout, compute(deal(policy, UNEVEN), TEMPERATURE)
    mine = range(at.dp.rank, len(UNEVEN), at.dp.size)
    rows = {i: row for part in gather_objects(list(zip(mine, found)), at.world_gloo) for i, row in part}
    lengths = [pack(samples(), indices).tokens.numel() for indices in UNEVEN]
    return np.concatenate([rows[i][:length] for i, length in enumerate(lengths)])


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Bit for bit."""
    return len(a) == len(b) > 0 and all(x.view(torch.uint8).equal(y.view(torch.uint8)) for x, y in zip(a, b))


def check_all_layouts_agree_with_an_average_of_our_own(ranks: Ranks) -> None:
    """After three updates: log-probs by weights that were averaged here, in float64, and loaded as weights are."""
    first = None
    for name, layout in LAYOUTS.items():
        policy = make(ranks, **layout)
        own = [w.double() for w in weights(policy)]
        moved = gathered(policy, policy.compute_logprobs)
        assert np.array_equal(reference_logprobs(policy), moved), f"{name}: at the start both are the loaded weights"
        for _ in range(3):
            step(policy)
            own = [DECAY * a + (1 - DECAY) * w.double() for a, w in zip(own, weights(policy), strict=True)]
        found = reference_logprobs(policy)
        other = make(ranks, average=False, **layout)
        with torch.no_grad():
            for parameter, value in zip((p for c in other.chunks for p in c.parameters()), own, strict=True):
                parameter.copy_(value)
        expected = gathered(other, other.compute_logprobs)
        np.testing.assert_allclose(found, expected, atol=2e-5, err_msg=name)
        assert np.abs(found - gathered(policy, policy.compute_logprobs)).max() > 0.01, f"{name}: it is the weights' own"
        first = found if first is None else first
        np.testing.assert_allclose(found, first, atol=2e-4, err_msg=name)


def check_experts(ranks: Ranks) -> None:
    found = []
    for layout in ({PP: 2}, {PP: 2, "expert_model_parallel_size": 2}, LAYOUTS["TP2 DP2"]):
        policy = make(ranks, "qwen3_moe", **layout)
        step(policy), step(policy)
        found.append(reference_logprobs(policy))
        assert np.abs(found[-1] - gathered(policy, policy.compute_logprobs)).max() > 0.01
        np.testing.assert_allclose(found[-1], found[0], atol=2e-4, err_msg=str(layout))


def check_training_goes_on_as_without_it(ranks: Ranks) -> None:
    """Weights after a reference pass are those before it, bit for bit, and so are those of the next update."""
    cases = [(name, precision) for name in ("TP2 DP2", "TP2 PP2, optimizer whole") for precision in ("fp32", "bf16")]
    cases += [("PP2 VPP2", "bf16"), ("DP4, several buckets", "fp32")]
    for name, precision in cases:
        layout = LAYOUTS[name]
        policy, plain = (make(ranks, average=a, precision=precision, **layout) for a in (True, False))
        step(policy), step(plain)
        before, values = weights(policy), [own.values.clone() for own in policy.average.ranges]
        assert same(before, weights(plain)), (name, precision)
        reference_logprobs(policy)
        assert same(weights(policy), before), (name, precision)
        assert same([own.values for own in policy.average.ranges], values), (name, precision)
        step(policy), step(plain)
        assert same(weights(policy), weights(plain)), (name, precision)
        assert plain.average is None


def check_average_of_the_masters_in_bf16(ranks: Ranks) -> None:
    """In bf16 it averages the fp32 masters, whose small moves the weights do not show."""
    policy = make(ranks, precision="bf16", optimizer={"lr": 1e-5})
    own = masters(policy)
    for _ in range(3):
        step(policy)
        own = [DECAY * a + (1 - DECAY) * m for a, m in zip(own, masters(policy), strict=True)]
    for found, expected in zip(policy.average.ranges, own, strict=True):
        assert found.values.dtype is torch.float32
        torch.testing.assert_close(found.values.double(), expected, rtol=0, atol=1e-7)
    assert sum(own.values.numel() for own in policy.average.ranges) < sum(w.numel() for w in weights(policy)) / 3


def check_an_error_in_the_pass_leaves_the_weights(ranks: Ranks) -> None:
    """Each rank's own part, without a collective on the way out: a rank that fails alone must not wait for others."""
    for name in ("DP4", "DP4, optimizer whole"):
        policy = make(ranks, **LAYOUTS[name])
        step(policy)
        before, whole = [own.weight.clone() for own in policy.average.ranges], weights(policy)
        with pytest.raises(KeyError), policy.average.in_model():
            assert not same(weights(policy), whole)
            raise KeyError
        assert same([own.weight for own in policy.average.ranges], before), name


def check_a_skipped_update_changes_nothing(ranks: Ranks) -> None:
    policy = make(ranks)
    step(policy)
    before = [own.values.clone() for own in policy.average.ranges]
    report = policy.train_step(deal(policy, UNEVEN), loss, 1e-45, TEMPERATURE)
    assert report.skipped
    assert same([own.values for own in policy.average.ranges], before)


def saved(ranks: Ranks, name: str, **layout: object) -> tuple[Path, np.ndarray, np.ndarray]:
    """A checkpoint after two updates; the average's log-probs then, and after a third."""
    folder = ranks.scratch / f"average-{name}-{layout.get('precision', '')}"
    policy = make(ranks, **layout)
    step(policy), step(policy)
    save_sharded(policy, folder)
    then = reference_logprobs(policy)
    step(policy)
    return folder, then, reference_logprobs(policy)


def resumed(ranks: Ranks, folder: Path, **layout: object) -> tuple[np.ndarray, np.ndarray]:
    policy = make(ranks, load=False, **layout)
    load_sharded(policy, folder)
    then = reference_logprobs(policy)
    step(policy)
    return then, reference_logprobs(policy)


def check_resume_is_bitwise_and_other_layouts_are_close(ranks: Ranks) -> None:
    divided = ["DP4, several buckets", "TP2 DP2", "PP2 VPP2"]
    whole = ["DP4, optimizer whole", "TP2 PP2, optimizer whole"]
    files = {}
    for name in divided + whole:
        layout = LAYOUTS[name]
        files[name] = folder, *expected = saved(ranks, name, **layout)
        for found, value in zip(resumed(ranks, folder, **layout), expected, strict=True):
            assert np.array_equal(found, value), name
    bf16 = {"precision": "bf16", **LAYOUTS["TP2 DP2"]}
    folder, *expected = saved(ranks, "TP2 DP2", **bf16)
    assert all(np.array_equal(a, b) for a, b in zip(resumed(ranks, folder, **bf16), expected, strict=True))
    for names in (divided, whole):
        for before, after in zip(names, [*names[1:], names[0]], strict=True):
            folder, *expected = files[before]
            for found, value in zip(resumed(ranks, folder, **LAYOUTS[after]), expected, strict=True):
                np.testing.assert_allclose(found, value, atol=2e-4, err_msg=f"{before} -> {after}")


def check_turned_on_and_off_between_starts(ranks: Ranks) -> None:
    """Without an average in the files it starts at their weights; one that nobody wants is left alone."""
    folder = ranks.scratch / "without"
    plain = make(ranks, average=False)
    step(plain)
    save_sharded(plain, folder)
    policy = make(ranks, load=False)
    load_sharded(policy, folder)
    assert np.array_equal(reference_logprobs(policy), gathered(plain, plain.compute_logprobs))
    folder, _, _ = saved(ranks, "wanted by nobody")
    policy = make(ranks, average=False, load=False)
    load_sharded(policy, folder)
    assert policy.average is None and step(policy) > 0


def check_decay_0_is_the_weights(ranks: Ranks) -> None:
    model = make_reference(ranks, "qwen2", tied=True).model
    policy = make_policy(model, algorithm=AVERAGE | {"reference_decay": 0.0})
    step(policy)
    assert np.array_equal(reference_logprobs(policy), gathered(policy, policy.compute_logprobs))


if __name__ == "__main__":
    run_checks(globals())
