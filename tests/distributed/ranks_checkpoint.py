"""Checkpoints: exact on the same layout, equal in any other; Megatron's own writer and reader agree with ours; every
file read once; nothing unpickled; a failed write raises on every rank."""

import pickle
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launch import Ranks, run_checks
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.distributed import DistributedDataParallelConfig
from policies import first_logprobs, make_policy, make_reference, step
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_nft.files import sha256_of_file
from megatron_nft.policy import cpu
from megatron_nft.policy.checkpoint import Saver, load_sharded, save_sharded
from megatron_nft.policy.checkpoint_optimizer import fill_adam_state, separate_steps
from megatron_nft.policy.checkpoint_state import sharded_models, without_classes
from megatron_nft.policy.own_ranges import distributed_parts
from megatron_nft.policy.policy import Policy

LAYOUTS = {
    "DP4": {},
    "TP2 DP2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2 DP2": {"pipeline_model_parallel_size": 2},
    "TP2 PP2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "PP2 VPP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "CP2 DP2": {"context_parallel_size": 2},
    "TP2 CP2": {"tensor_model_parallel_size": 2, "context_parallel_size": 2},
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


def check_other_layouts_with_padded_buckets(ranks: Ranks) -> None:
    """Buckets are padded at their ends. Megatron-LM #5077 cuts the optimizer's state at these padded offsets; what is
    written here knows nothing of buckets."""
    small = partial(DistributedDataParallelConfig, bucket_size=700)  # elements
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_nft.policy.policy.DistributedDataParallelConfig", small)
        for before, after in (("DP4", "TP2 DP2"), ("PP2 DP2", "DP4")):
            folder, expected = saved(ranks, before, overlap_grad_reduce=True)
            optimizer = make(ranks, before, overlap_grad_reduce=True).optimizer
            buffers = [buffer for part in distributed_parts(optimizer) for buffer in part.buffers]
            if ranks.rank == 0:  # later stages have one bucket
                assert any(len(buffer.buckets) > 2 for buffer in buffers), "no padding between parameters"
            resumed = resume(ranks, folder, after, overlap_grad_reduce=True)
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


def megatrons_state(policy: Policy, *, loading: bool) -> dict:
    """Weights and optimizer as Megatron's own code lays them out, gathered over replicas: what the first versions of
    this program wrote. Only right where a gradient buffer has one bucket (Megatron-LM #5077)."""
    fill_adam_state(policy)
    content = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
    models = sharded_models(policy)
    optimizer = policy.optimizer.sharded_state_dict(models, is_loading=loading, metadata=dict(content))
    return {**models, "optimizer": optimizer}


def save_as_megatron_does(policy: Policy, folder: Path) -> None:
    at = policy.layout
    sizes = {"world": at.world_size, "tp": at.tp.size, "pp": at.pp.size, "dp": at.dp.size, "ep": at.ep_size}
    with cpu.on_cpu():
        state = megatrons_state(policy, loading=False) | {
            "settings": policy.config.policy.model_dump(include={"precision", "use_distributed_optimizer"}),
            "layout": sizes | {"vpp": at.vpp_size or 1, "without": "random states"},
            "schedule": policy.schedule.state_dict(),
        }
        sharded, common = save_preprocess(state)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
        if dist.get_rank() == 0:
            folder.mkdir()
            torch.save(without_classes(common), folder / "common.pt")
            save_config(CheckpointingConfig("torch_dist", 1), str(folder))
        dist.barrier()
        save(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=FileSystemWriter(folder, single_file_per_rank=True, thread_count=1),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            process_group=policy.layout.world_gloo,
        )


def check_checkpoints_of_megatrons_writer_load(ranks: Ranks) -> None:
    """In the layout that saved them, bit for bit, and in others. Their layout says nothing of CP, as in older versions'
    checkpoints of ours."""
    cases = [("DP4", "DP4"), ("TP2 DP2", "TP2 DP2"), ("TP2 DP2", "PP2 DP2"), ("DP4", "TP2 PP2"), ("DP4", "CP2 DP2")]
    for before, after in cases:
        made = make(ranks, before, "llama")
        step(made), step(made)
        folder = ranks.scratch / f"megatron-{before}-{after}"
        save_as_megatron_does(made, folder)
        step(made)
        expected, resumed = first_logprobs(made), resume(ranks, folder, after, "llama")
        np.testing.assert_allclose(resumed, expected, atol=0 if before == after else 2e-4, err_msg=f"{before} {after}")


def check_megatrons_reader_loads_ours(ranks: Ranks) -> None:
    """It finds every element of weights and optimizer state, in the layout that saved and in another."""
    for before, after in (("TP2 DP2", "TP2 DP2"), ("PP2 DP2", "DP4")):
        folder, expected = saved(ranks, before, "llama")
        made = make(ranks, after, "llama", load=False)
        with cpu.on_cpu():
            loaded = dist_checkpointing.load(megatrons_state(made, loading=True), str(folder))
            for i, chunk in enumerate(made.chunks):
                chunk.load_state_dict(loaded[f"model{i}"])
            made.optimizer.load_state_dict(loaded["optimizer"])
            separate_steps(made)
            made.schedule.num_steps = 0
            made.schedule.load_state_dict(loaded["schedule"])
        step(made)
        np.testing.assert_allclose(
            first_logprobs(made), expected, atol=0 if before == after else 2e-4, err_msg=f"{before} {after}"
        )


def check_a_rank_of_the_same_layout_reads_its_own_file_whole(ranks: Ranks) -> None:
    """So that all files are read once, and hashed on the way: also with a tied embedding on two stages, and where
    tensor ranks share what only one of them has written."""
    cases = [("DP4", "qwen2"), ("TP2 DP2", "qwen2"), ("CP2 DP2", "qwen2"), ("TP2 PP2", "qwen2")]
    for layout, family in [*cases, ("PP2 DP2", "qwen3_moe")]:
        folder, _ = saved(ranks, layout, family)
        found = load_sharded(make(ranks, layout, family, load=False), folder)
        mine = f"__{ranks.rank}_0.distcp"
        assert found.get(mine) == sha256_of_file(folder / mine), (layout, family, found)
    other = load_sharded(make(ranks, "TP2 DP2", load=False), saved(ranks, "DP4")[0])
    assert other == {}, "files that were read in parts have no digest"


def check_every_rank_writes_its_share(ranks: Ranks) -> None:
    folder, _ = saved(ranks, "DP4")
    sizes = [path.stat().st_size for path in folder.glob("*.distcp")]
    assert len(sizes) == 4 and max(sizes) < 1.2 * sum(sizes) / 4, sizes


def check_a_snapshot_is_of_its_moment(ranks: Ranks) -> None:
    """Training goes on between copying and writing, and a later snapshot takes the memory of the one before."""
    for policy in ({}, {"use_distributed_optimizer": False}):
        made = make(ranks, "PP2 DP2", **policy)
        saver = Saver(made, copies=True)
        saver.snapshot()
        step(made), step(made)
        snapshot = saver.snapshot()
        step(made)
        expected = first_logprobs(made)
        step(made)
        folder = ranks.scratch / f"snapshot-{len(policy)}"
        folder.mkdir(exist_ok=True)
        parts: list = [None] * ranks.world_size
        dist.all_gather_object(parts, snapshot.write(folder))
        if ranks.rank == 0:
            snapshot.finish(folder, parts)
        dist.barrier()
        assert np.array_equal(resume(ranks, folder, "PP2 DP2", **policy), expected), policy


def check_an_index_of_half_a_tensor_is_not_written(ranks: Ranks) -> None:
    made = make(ranks, "DP4")
    folder = ranks.scratch / "half"
    folder.mkdir(exist_ok=True)
    snapshot = Saver(made, copies=False).snapshot()
    parts: list = [None] * ranks.world_size
    dist.all_gather_object(parts, snapshot.write(folder))
    if ranks.rank == 0:
        try:
            snapshot.finish(folder, parts[:-1])
        except ValueError as error:
            assert "elements of" in str(error) and "were written" in str(error), error
        else:
            raise AssertionError("the last rank's part was not missed")
        assert not (folder / ".metadata").exists()


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
