"""The Megatron part of a checkpoint: weights, optimizer state, schedule and RNG as sharded torch_dist files.

Any layout loads what any other has saved: tensors are stored by their place in the whole model. The same layout goes on
bit for bit. RNG states belong to a rank and are restored only where the layout is the same one.

Files: `*.distcp` (tensors), `.metadata` (where each piece lies), `common.pt` (schedule, hyper-parameters) and
`metadata.json`. They are what stock Megatron-Core reads. Two differences from its own writer:

- Written by torch's own FileSystemWriter in this process. Megatron's writer starts a manager process and forks one
  writer per file, also when it is asked to be synchronous; that costs seconds, and needs a `__main__` guard.
- Nothing in it is unpickled freely. Tensor files and common.pt go through `torch.load(weights_only=True)`. torch reads
  `.metadata` with plain pickle, so it is first read here with an unpickler that knows only torch's checkpoint records
  (`ALLOWED_IN_METADATA`). Pickled objects among the entries are refused; we write none: Transformer Engine's FP8
  `_extra_state` is left out, so amax histories start anew after a resume.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
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
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_nft.distributed import run_everywhere
from megatron_nft.policy import cpu
from megatron_nft.policy.fp8_history import fp8_history
from megatron_nft.policy.policy import Policy

EXTRA_STATE = "_extra_state"
ALLOWED_IN_METADATA = {
    "torch": {"Size", "float32", "bfloat16", "float16", "uint8", "int64"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath"},
}


def save_sharded(policy: Policy, folder: Path | str) -> None:
    """Write `folder` (made if needed), all ranks together.

    An error on one rank, such as a full disk, is raised on all of them.
    """
    folder = Path(folder)
    group = policy.layout.world_gloo  # host memory: plans are exchanged as objects
    with cpu.on_cpu():
        _fill_adam_state(policy)
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
            dcp.save(
                mcore_to_pyt_state_dict(by_key, False),
                storage_writer=dcp.FileSystemWriter(folder, single_file_per_rank=True, thread_count=1),
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
        _fill_adam_state(policy)
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
        _own_steps(policy)
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


def check_metadata(folder: Path) -> None:
    """ValueError when `.metadata` names anything but torch's checkpoint records, or holds pickled objects."""
    for key, entry in read_metadata(folder).state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{folder / '.metadata'}: entry {key!r} is a pickled object; allowed: tensors")


def read_metadata(folder: Path) -> Metadata:
    """What `.metadata` says; ValueError when it names anything but torch's checkpoint records."""
    path = folder / ".metadata"
    with path.open("rb") as file:
        return _MetadataUnpickler(file, path).load()


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED_IN_METADATA.get(module, ()):
            raise ValueError(
                f"{self.path} wants to load {module}.{name}; allowed: torch's checkpoint records only. "
                "The file was not written by this program, or was tampered with"
            )
        return super().find_class(module, name)


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
    """What decides the form of the optimizer state."""
    return policy.config.policy.model_dump(include={"precision", "use_distributed_optimizer"})


def _layout(policy: Policy) -> dict[str, int]:
    at = policy.layout
    sizes = {"world": at.world_size, "tp": at.tp_size, "pp": at.pp_size, "dp": at.dp_size, "ep": at.ep_size}
    return sizes | {"vpp": at.vpp_size or 1}


def _sharded_state(policy: Policy, *, loading: bool) -> dict[str, Any]:
    content = _content()
    models = {f"model{i}": chunk.sharded_state_dict(metadata=content) for i, chunk in enumerate(policy.chunks)}
    for sharded in models.values():
        for name in [name for name in sharded if name.endswith(EXTRA_STATE)]:
            del sharded[name]
    with _bucket_padding(policy), _quick_collection():
        optimizer = policy.optimizer.sharded_state_dict(models, is_loading=loading, metadata=content)
    scales = _by_rank(policy, "fp8", fp8_history(policy.chunks))
    return {**models, "optimizer": optimizer, "rng": _sharded_rng(policy), **({"fp8": scales} if scales else {})}


@contextlib.contextmanager
def _quick_collection() -> Iterator[None]:
    """Megatron collects garbage while it gathers: with the objects of every imported package that is most of the time
    that saving a small model takes. Frozen objects are passed over."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _bucket_padding(policy: Policy) -> Iterator[None]:
    """Corrects the gathered optimizer state of megatron-core 0.16.1's distributed optimizer while it is asked for.

    `get_parameter_state_dp_zero` joins a buffer's buckets without the padding between them, and the reshardable format
    then cuts parameters out by positions that count the padding: with two or more buckets (tied embeddings under
    pipeline parallelism, overlapped reduction) another part of the buffer is saved, without an error.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    optimizers = [part for part in _parts(policy) if isinstance(part, DistributedOptimizer)]
    for optimizer in optimizers:
        optimizer.get_parameter_state_dp_zero = functools.partial(_gather_with_padding, optimizer)
    try:
        yield
    finally:
        for optimizer in optimizers:
            del optimizer.get_parameter_state_dp_zero


def _gather_with_padding(optimizer: Any, **kwargs: Any) -> dict[Any, Any] | None:
    """type(optimizer).get_parameter_state_dp_zero, with each bucket at its place in the padded buffer."""
    state = type(optimizer).get_parameter_state_dp_zero(optimizer, **kwargs)
    for index, buffer in enumerate(optimizer.buffers if state is not None else ()):
        for tensors in state[index].values():
            for key in ("param", "exp_avg", "exp_avg_sq"):
                joined, padded, done = tensors[key], tensors[key].new_zeros(buffer.numel), 0
                for (start, _), bucket in zip(buffer.bucket_indices, buffer.buckets, strict=True):
                    padded[start : start + bucket.numel_unpadded] = joined[done : done + bucket.numel_unpadded]
                    done += bucket.numel_unpadded
                tensors[key] = padded
    return state


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


def _parts(policy: Policy) -> list[Any]:
    """Megatron's optimizers: one, or one for dense and one for expert parameters."""
    return getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])


def _adams(policy: Policy) -> list[torch.optim.Optimizer]:
    """torch's AdamWs in use; empty with Transformer Engine's or apex's, which Megatron fills by itself."""
    return [part.optimizer for part in _parts(policy) if isinstance(part.optimizer, torch.optim.AdamW)]


def _fill_adam_state(policy: Policy) -> None:
    """torch's AdamW has no state before its first step; saving and loading need tensors to name."""
    for adam in _adams(policy):
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            if not adam.state[parameter]:
                adam.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _own_steps(policy: Policy) -> None:
    """Give every parameter its own `step`. megatron-core 0.16.1 loads one tensor into all of them, so that a step
    counts once per parameter and the bias correction of the resumed run is silently wrong."""
    for adam in _adams(policy):
        for state in adam.state.values():
            state["step"] = state["step"].clone()
