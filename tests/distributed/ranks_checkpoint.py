"""Checkpoints: exact on the same layout, equal in any other; nothing unpickled; a failed write raises on every rank."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from launch import Ranks, run_checks
from policies import first_logprobs, make_policy, make_reference, step

from megatron_nft.policy.checkpoint import load_sharded, save_sharded
from megatron_nft.policy.policy import Policy

LAYOUTS = {
    "DP4": {},
    "TP2 DP2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2 DP2": {"pipeline_model_parallel_size": 2},
    "TP2 PP2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "PP2 VPP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
}
OPTIMIZER = {"lr": 1e-2, "lr_warmup_steps": 4}


def weights(policy: Policy) -> list[torch.Tensor]:
    return [p.detach().clone() for chunk in policy.chunks for p in chunk.parameters()]


def make(ranks: Ranks, layout: str, family: str = "qwen2", load: bool = True, **policy: object) -> Policy:
    reference = make_reference(ranks, family, tied=family == "qwen2")
    return make_policy(reference.model, load=load, optimizer=OPTIMIZER, **LAYOUTS[layout], **policy)


def saved(ranks: Ranks, layout: str, family: str = "qwen2", **policy: object) -> tuple[Path, np.ndarray]:
    """A checkpoint after two steps, and the log-probs after a third."""
    folder = ranks.scratch / "-".join(["saved", layout, family, *map(str, policy.values())])
    made = make(ranks, layout, family, **policy)
    step(made), step(made)
    save_sharded(made, folder)
    step(made)
    return folder, first_logprobs(made)


def resume(ranks: Ranks, folder: Path, layout: str, family: str = "qwen2", **policy: object) -> np.ndarray:
    made = make(ranks, layout, family, load=False, **policy)
    load_sharded(made, folder)
    assert made.schedule.num_steps == 2
    step(made)
    assert made.schedule.num_steps == 3 and made.lr == OPTIMIZER["lr"] * 3 / 4
    return first_logprobs(made)


def check_same_layout_is_bitwise(ranks: Ranks) -> None:
    # overlap_grad_reduce cuts the gradient buffers into several buckets
    cases = [(layout, {"overlap_grad_reduce": True}) for layout in LAYOUTS]
    cases += [("TP2 PP2", {"use_distributed_optimizer": False}), ("PP2 DP2", {"precision": "bf16"})]
    for layout, policy in cases:
        folder, expected = saved(ranks, layout, **policy)
        resumed = resume(ranks, folder, layout, **policy)
        assert np.array_equal(resumed, expected), (layout, policy, np.abs(resumed - expected).max())


def check_other_layouts(ranks: Ranks) -> None:
    names = list(LAYOUTS)
    for before, after in zip(names, [*names[1:], names[0]], strict=True):
        folder, expected = saved(ranks, before)
        resumed = resume(ranks, folder, after)
        np.testing.assert_allclose(resumed, expected, atol=2e-4, err_msg=f"{before} -> {after}")


def check_mixture_of_experts(ranks: Ranks) -> None:
    folder, expected = saved(ranks, "PP2 DP2", "qwen3_moe", expert_model_parallel_size=2)
    assert np.array_equal(resume(ranks, folder, "PP2 DP2", "qwen3_moe", expert_model_parallel_size=2), expected)
    try:
        resume(ranks, folder, "TP2 DP2", "qwen3_moe")
    except ValueError as error:
        assert "expert_model_parallel_size 2 and cannot be loaded with 1" in str(error), error
    else:
        raise AssertionError("loaded with another number of optimizers")
    folder, expected = saved(ranks, "PP2 DP2", "qwen3_moe")
    np.testing.assert_allclose(resume(ranks, folder, "TP2 DP2", "qwen3_moe"), expected, atol=2e-4)


def check_before_the_first_step(ranks: Ranks) -> None:
    made = make(ranks, "DP4")
    save_sharded(made, ranks.scratch / "fresh")
    step(made)
    expected = first_logprobs(made)
    resumed = make(ranks, "DP4", load=False)
    load_sharded(resumed, ranks.scratch / "fresh")
    assert resumed.schedule.num_steps == 0
    step(resumed)
    assert np.array_equal(first_logprobs(resumed), expected)


def check_every_parameter_has_its_own_step(ranks: Ranks) -> None:
    """megatron-core 0.16.1 loads one `step` tensor into all parameters of torch's AdamW."""
    for policy in ({}, {"use_distributed_optimizer": False}):
        folder, _ = saved(ranks, "DP4", **policy)
        made = make(ranks, "DP4", load=False, **policy)
        load_sharded(made, folder)
        states = [s for part in made.optimizer.chained_optimizers for s in part.optimizer.state.values()]
        assert len(states) > 1 and len({s["step"].data_ptr() for s in states}) == len(states)
        assert {s["step"].item() for s in states} == {2.0}
        step(made)
        assert {s["step"].item() for s in states} == {3.0}


def check_random_state(ranks: Ranks) -> None:
    made = make(ranks, "DP4")
    torch.manual_seed(100 + ranks.rank)
    save_sharded(made, ranks.scratch / "random")
    expected = torch.rand(3)
    made = make(ranks, "DP4", load=False)
    torch.manual_seed(7)
    load_sharded(made, ranks.scratch / "random")
    assert torch.equal(torch.rand(3), expected)


def check_only_tensors_and_plain_values(ranks: Ranks) -> None:
    """A file that would run code when unpickled is refused, and does not run it."""
    folder, _ = saved(ranks, "DP4")
    mark = ranks.scratch / f"ran-{ranks.rank}"
    bomb = pickle.dumps(_Bomb(str(mark)))
    for name in (".metadata", "common.pt"):
        copy = ranks.scratch / f"bad-{name}-{ranks.rank}"
        shutil.copytree(folder, copy)
        (copy / name).write_bytes(bomb)
        made = make(ranks, "DP4", load=False)
        try:
            load_sharded(made, copy)
        except (ValueError, pickle.UnpicklingError, RuntimeError) as error:
            assert "mkdir" in str(error) or "weights_only" in str(error).lower(), error
        else:
            raise AssertionError(f"{name} was unpickled")
        assert not mark.exists()


class _Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (self.path,)


def check_a_failed_write_raises_everywhere(ranks: Ranks) -> None:
    made = make(ranks, "PP2 DP2")
    before = weights(made)
    blocked = ranks.scratch / "blocked"
    if ranks.rank == 0:
        blocked.touch()  # a file where the folder should be
    dist.barrier()
    try:
        save_sharded(made, blocked)
    except OSError as error:
        assert "blocked" in str(error)
    else:
        raise AssertionError("the failed write was not reported")
    step(made)
    assert not all(torch.equal(a, b) for a, b in zip(before, weights(made), strict=True))


def check_another_optimizer_is_refused(ranks: Ranks) -> None:
    folder, _ = saved(ranks, "DP4")
    for change in ({"precision": "bf16"}, {"use_distributed_optimizer": False}):
        try:
            load_sharded(make(ranks, "DP4", load=False, **change), folder)
        except ValueError as error:
            assert f"was saved with policy.{next(iter(change))}=" in str(error), error
        else:
            raise AssertionError(change)


def check_another_model_is_refused(ranks: Ranks) -> None:
    folder, _ = saved(ranks, "DP4")
    reference = make_reference(ranks, "qwen2", tied=True, layers=2)
    made = make_policy(reference.model, optimizer=OPTIMIZER, load=False)
    try:
        load_sharded(made, folder)
    except ValueError as error:
        assert "mismatch" in str(error), error
    else:
        raise AssertionError("a checkpoint of four layers was loaded into a model of two")


if __name__ == "__main__":
    run_checks(globals())
