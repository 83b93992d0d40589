"""The Megatron part of a checkpoint: weights, optimizer state, schedule and RNG as sharded torch_dist files.

Tensors are stored by their place in the whole model, so any layout loads what any other has saved, except that expert
parallelism must be on in both or off in both. The same layout continues bit for bit. RNG states and the scales of FP8's
delayed recipe belong to a rank: they are restored only where the layout is the same one.

Files: `*.distcp` (tensors), `.metadata` (where each tensor lies), `common.pt` (schedule, hyper-parameters) and
`metadata.json`. They are what stock Megatron-Core reads. There are two differences from its own writer:

- The files are written by torch's own FileSystemWriter in this process. Megatron's writer starts a manager process and
  forks one writer per file, even when it is asked to be synchronous; that costs seconds, and needs a `__main__` guard.
- Nothing is unpickled freely. Tensor files and common.pt go through `torch.load(weights_only=True)`, and `.metadata` is
  first read by policy/checkpoint_metadata.py. Pickled objects among the entries are refused, and none are written:
  Transformer Engine's pickled `_extra_state` is left out, and policy/fp8_history.py saves what an exact resume needs of
  it as tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_nft.distributed import run_everywhere
from megatron_nft.policy import cpu
from megatron_nft.policy.checkpoint_metadata import check_metadata, read_metadata
from megatron_nft.policy.checkpoint_optimizer import bucket_padding, fill_adam_state, quick_collection, separate_steps
from megatron_nft.policy.fp8_history import fp8_history
from megatron_nft.policy.policy import Policy

EXTRA_STATE = "_extra_state"


def save_sharded(policy: Policy, folder: Path | str) -> None:
    """Write `folder` (made if needed), all ranks together.

    An error on one rank, such as a full disk, is raised on all of them.
    """
    folder = Path(folder)
    group = policy.layout.world_gloo  # host memory: plans are exchanged as objects
    with cpu.on_cpu():
        fill_adam_state(policy)
        state = _sharded_state(policy, loading=False)
        state |= {
            "settings": _settings(policy),
            "layout": _layout(policy),
            "schedule": policy.schedule.state_dict(),
        }
        sharded, common = save_preprocess(state | {"content_metadata": _content()})
        common = _without_classes(common)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
        _on_first_rank(lambda: folder.mkdir(parents=True, exist_ok=True), group)
        _on_first_rank(lambda: torch.save(common, folder / "common.pt"), group)
        with _plain_errors(OSError, f"could not write {folder}"):
            save(
                mcore_to_pyt_state_dict(by_key, False),
                storage_writer=FileSystemWriter(folder, single_file_per_rank=True, thread_count=1),
                planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
                process_group=group,
            )
        _on_first_rank(lambda: save_config(CheckpointingConfig("torch_dist", 1), str(folder)), group)


def _without_classes(state: Any) -> Any:
    """`state` without entries that are classes: the optimizer on the host names its own in every parameter group, and a
    class is what loading refuses to unpickle."""
    if isinstance(state, dict):
        return {key: _without_classes(value) for key, value in state.items() if not isinstance(value, type)}
    return [_without_classes(value) for value in state] if isinstance(state, list) else state


def _on_first_rank(work: Callable[[], Any], group: dist.ProcessGroup) -> None:
    """Run `work` on rank 0. Its error is raised on every rank, as an OSError: torch.save reports a full disk as a
    RuntimeError."""
    run_everywhere(lambda: work() if dist.get_rank(group) == 0 else None, group, OSError)


def load_sharded(policy: Policy, folder: Path | str) -> None:
    """Load `folder` into `policy`, all ranks together.

    ValueError where the files hold what this program never writes, or another model.
    """
    folder = Path(folder)
    common = torch.load(folder / "common.pt", map_location="cpu", weights_only=True)
    check_metadata(folder)
    for name, value in _settings(policy).items():
        if common["settings"][name] != value:
            raise ValueError(
                f"{folder} was saved with policy.{name}={common['settings'][name]}, this run has {value}, and the "
                "optimizer state has another form: use the saved setting, or start from the weights"
            )
    saved, own = common["layout"], _layout(policy)
    if (saved["ep"] > 1) != (own["ep"] > 1):
        raise ValueError(
            f"{folder} was saved with expert_model_parallel_size {saved['ep']} and cannot be loaded with {own['ep']}: "
            "Megatron keeps expert parameters in an optimizer of their own above 1. Use the saved size"
        )
    with cpu.on_cpu():
        fill_adam_state(policy)
        state = _sharded_state(policy, loading=True)
        if saved != own:
            del state["rng"]
        if saved != own or not any(key.startswith("fp8.") for key in read_metadata(folder).state_dict_metadata):
            state.pop("fp8", None)  # as at the start of a run
        with _plain_errors(ValueError, f"could not load {folder}"):
            loaded = dist_checkpointing.load(state, str(folder))
        for i, chunk in enumerate(policy.chunks):
            _load_model(chunk, loaded[f"model{i}"])
        policy.optimizer.load_state_dict(loaded["optimizer"])
        separate_steps(policy)
        policy.schedule.num_steps = 0  # Megatron adds the loaded count to it
        policy.schedule.load_state_dict(loaded["schedule"])
        for name, tensor in fp8_history(policy.chunks).items() if "fp8" in loaded else ():
            tensor.copy_(loaded["fp8"][name][0])
        if "rng" in loaded:
            _set_rng(loaded["rng"])


def _load_model(chunk: torch.nn.Module, state: dict[str, Any]) -> None:
    """Every tensor of `state` and no other; Transformer Engine's extra state, pickled, is neither saved nor wanted."""
    missing, unexpected = chunk.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith(EXTRA_STATE)]
    if missing or unexpected:
        raise ValueError(f"the checkpoint is of another model: it lacks {missing} and has {list(unexpected)} besides")


@contextlib.contextmanager
def _plain_errors(kind: type[Exception], what: str) -> Iterator[None]:
    """torch's CheckpointException holds each rank's error and is no Exception: raise the first one as `kind`."""
    try:
        yield
    except CheckpointException as error:
        rank, (problem, _) = next(iter(error.failures.items()))
        raise kind(f"{what} (rank {rank}): {type(problem).__name__}: {problem}") from None


def _content() -> dict[str, Any]:
    """How Megatron lays the optimizer state out. On GPUs a replica's state is gathered on the host of its
    data-parallel rank 0 alone, not on every rank."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": torch.cuda.is_available(),
        "chained_optim_avoid_prefix": True,
    }


def _settings(policy: Policy) -> dict[str, Any]:
    """Return the settings that decide the form of the optimizer state."""
    return policy.config.policy.model_dump(include={"precision", "use_distributed_optimizer"})


def _layout(policy: Policy) -> dict[str, int]:
    at = policy.layout
    sizes = {"world": at.world_size, "tp": at.tp.size, "pp": at.pp.size, "dp": at.dp.size, "ep": at.ep_size}
    return sizes | {"vpp": at.vpp_size or 1}


def _sharded_state(policy: Policy, *, loading: bool) -> dict[str, Any]:
    content = _content()
    models = {f"model{i}": chunk.sharded_state_dict(metadata=content) for i, chunk in enumerate(policy.chunks)}
    for sharded in models.values():
        for name in [name for name in sharded if name.endswith(EXTRA_STATE)]:
            del sharded[name]
    with bucket_padding(policy), quick_collection():
        optimizer = policy.optimizer.sharded_state_dict(models, is_loading=loading, metadata=content)
    scales = _by_rank(policy, "fp8", fp8_history(policy.chunks))
    return {**models, "optimizer": optimizer, "rng": _sharded_rng(policy), **({"fp8": scales} if scales else {})}


def _sharded_rng(policy: Policy) -> dict[str, ShardedTensor]:
    """This rank's generator states, uint8, each one row of a [world_size, bytes] tensor."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    states |= {f"tracker.{name}": state for name, state in get_cuda_rng_tracker().get_states().items()}
    return _by_rank(policy, "rng", states)


def _by_rank(policy: Policy, kind: str, tensors: dict[str, torch.Tensor]) -> dict[str, ShardedTensor]:
    """Tensors that every rank has its own of, each one row of a [world_size, ...] tensor."""
    at = policy.layout
    return {
        name: ShardedTensor.from_rank_offsets(f"{kind}.{name}", tensor[None].clone(), (0, at.rank, at.world_size))
        for name, tensor in tensors.items()
    }


def _set_rng(states: dict[str, torch.Tensor]) -> None:
    states = {name: state[0] for name, state in states.items()}
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    prefix = "tracker."
    trackers = {name.removeprefix(prefix): state for name, state in states.items() if name.startswith(prefix)}
    get_cuda_rng_tracker().set_states(trackers)
