"""The Megatron part of a checkpoint: weights, optimizer state, schedule and RNG as sharded torch_dist files.

Tensors are stored by their place in the whole model, so any layout loads what any other has saved, except that expert
parallelism must be on in both or off in both. The same layout continues bit for bit. RNG states and the scales of FP8's
delayed recipe belong to a rank: they are restored only where the layout is the same one.

Files: `*.distcp` (tensors, one file per rank), `.metadata` (where each tensor lies), `common.pt` (schedule,
hyper-parameters) and `metadata.json`. They are what stock Megatron-Core reads and, as its "fully reshardable" format,
writes. What is done in another way than there:

- Every rank writes and reads its own part of weights and optimizer state (checkpoint_pieces.py). Megatron gathers a
  replica's optimizer state on one rank for this format, and its formats without a gather are bound to TP, PP and VPP.
- `Saver.snapshot` is quick and what remains (`Snapshot.write`) needs no other rank and no GPU, so that it can happen in
  a thread while the training goes on. Megatron's own asynchronous writer forks processes beside CUDA, gloo's threads
  and the engine, or needs a `__main__` guard, and hashes nothing.
- Nothing is unpickled freely. `.metadata` and the tensor files are read by checkpoint_metadata.py and
  checkpoint_item.py, common.pt by `torch.load(weights_only=True)`. Pickled objects among the entries are refused, and
  none are written: Transformer Engine's pickled `_extra_state` is left out, and policy/fp8_history.py saves what an
  exact resume needs of it as tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_nft.distributed import gather_objects, run_everywhere
from megatron_nft.policy import cpu
from megatron_nft.policy.checkpoint_memory import HostMemory
from megatron_nft.policy.checkpoint_optimizer import fill_adam_state, separate_steps
from megatron_nft.policy.checkpoint_pieces import (
    STATE,
    Piece,
    range_pieces,
    sharded_by_parameter,
    whole_piece,
)
from megatron_nft.policy.checkpoint_reader import HashingReader, StoredTensors
from megatron_nft.policy.checkpoint_state import CONTENT, EXTRA_STATE, sharded_models, undivided_state, without_classes
from megatron_nft.policy.checkpoint_writer import StoredTensor, WrittenFile, pack_common, write_index, write_pieces
from megatron_nft.policy.fp8_history import fp8_history
from megatron_nft.policy.optimizer import optimizer_parts
from megatron_nft.policy.own_ranges import distributed_parts, divided_parameters, own_ranges
from megatron_nft.policy.policy import Policy


@dataclass(frozen=True, slots=True)
class WrittenPart:
    """What one rank has written: its file, and the tensors of the whole model that it holds boxes of."""

    file: WrittenFile
    tensors: dict[str, StoredTensor]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a rank writes into a checkpoint. Neither method waits for another rank or touches a GPU, if the values are
    copies."""

    rank: int
    pieces: Sequence[Piece]
    common: bytes  # on the first rank alone

    def write(self, folder: Path) -> WrittenPart:
        """Write this rank's file into `folder`, which must exist. OSError on a full disk."""
        values = ((piece.key, piece.offsets, piece.values.cpu()) for piece in self.pieces)
        file = write_pieces(folder / f"__{self.rank}_0.distcp", values)
        return WrittenPart(file, {p.key: StoredTensor(p.shape, p.values.dtype) for p in self.pieces})

    def finish(self, folder: Path, parts: Sequence[WrittenPart]) -> None:
        """On the first rank, when all have written: the files that describe all `parts`."""
        tensors = {key: stored for part in parts for key, stored in part.tensors.items()}
        write_index(folder, tensors, [part.file for part in parts], self.common)


class Saver:
    """Takes snapshots of a policy."""

    def __init__(self, policy: Policy, *, copies: bool) -> None:
        """`copies`: into host memory (pinned on a GPU's host) that is kept for the next snapshot, so that the policy
        may go on training while one is written. Without, a snapshot is of what the policy holds when it is written."""
        self._policy = policy
        self._memory = HostMemory(pinned=policy.layout.device.type == "cuda") if copies else None

    def snapshot(self) -> Snapshot:
        """This rank's part as it is now. With `copies` the snapshot before must be written, or given up, by then."""
        policy = self._policy
        with cpu.on_cpu():
            fill_adam_state(policy)
            pieces, common = _pieces_to_write(policy)
            if self._memory is not None:
                copied = self._memory.copy([piece.values for piece in pieces])
                pieces = [replace(piece, values=values) for piece, values in zip(pieces, copied, strict=True)]
            first = policy.layout.rank == 0
            return Snapshot(policy.layout.rank, pieces, pack_common(without_classes(common)) if first else b"")


def save_sharded(policy: Policy, folder: Path | str) -> None:
    """Write `folder` (made if needed), all ranks together.

    An error on one rank, such as a full disk, is raised on all of them.
    """
    folder, group = Path(folder), policy.layout.world_gloo
    snapshot = Saver(policy, copies=False).snapshot()
    _on_first_rank(lambda: folder.mkdir(parents=True, exist_ok=True), group)
    part = run_everywhere(lambda: snapshot.write(folder), group, OSError, f"could not write {folder}")
    parts = gather_objects(part, group)
    _on_first_rank(lambda: snapshot.finish(folder, parts), group)


def _on_first_rank(work: Callable[[], Any], group: dist.ProcessGroup) -> None:
    """Run `work` on rank 0. Its error is raised on every rank, as an OSError."""
    run_everywhere(lambda: work() if dist.get_rank(group) == 0 else None, group, OSError)


def _pieces_to_write(policy: Policy) -> tuple[list[Piece], dict[str, Any]]:
    """The pieces that this rank writes, in the order in which it reads them again, and what is not sharded."""
    models = sharded_models(policy)
    described = sharded_by_parameter(models)
    pieces: list[Piece] = []
    for own in own_ranges(policy.optimizer):
        sharded = described[own.parameter]
        for name, values in own.states().items():
            pieces += range_pieces(sharded, values, own.start, f"{STATE}{name}.")
        pieces += range_pieces(sharded, own.weight, own.start)
    pieces += _average_pieces(policy, described)
    rest, common = save_preprocess(undivided_state(policy, models, loading=False), validate_access_integrity=False)
    pieces += [whole_piece(sharded) for sharded in nested_values(rest)]
    common |= {
        "settings": _settings(policy),
        "layout": _layout(policy),
        "schedule": policy.schedule.state_dict(),
        "content_metadata": CONTENT,
    }
    return [piece for piece in pieces if piece.main], common


def _average_pieces(policy: Policy, described: dict[torch.Tensor, ShardedBase]) -> Iterator[Piece]:
    """Of the moving average of the weights, if there is one; stored as a further state of the optimizer."""
    average = policy.average
    if average is None:
        return
    for own in average.ranges:
        sharded = described[own.parameter]
        yield from range_pieces(sharded, own.values, own.start, f"{STATE}average.", divided=average.divided)


def load_sharded(policy: Policy, folder: Path | str) -> dict[str, str]:
    """Load `folder` into `policy`, all ranks together.

    A moving average of the weights that the files do not hold starts at the weights that they hold.

    Returns the SHA-256, by file name, of the files that this rank has read from the first byte to the last: its own,
    if the layout is the one that saved. What is in none of the ranks' answers was read in parts.

    ValueError where the files hold what this program never writes, or another model.
    """
    folder, group = Path(folder), policy.layout.world_gloo
    stored = run_everywhere(lambda: StoredTensors(folder), group, ValueError)
    common = run_everywhere(stored.read_common, group, ValueError)
    _check(policy, stored, common)
    with cpu.on_cpu():
        fill_adam_state(policy)
        models = sharded_models(policy)
        if distributed_parts(policy.optimizer):
            policy.optimizer.load_state_dict(common["optimizer"])
        with HashingReader(stored) as reader:
            loaded = run_everywhere(
                lambda: _read(policy, models, common, stored, reader), group, ValueError, f"could not load {folder}"
            )
            digests = reader.digests()
        _restore_rest(policy, loaded)
        if distributed_parts(policy.optimizer):
            for ddp in policy.wrapped:
                ddp.start_param_sync(force_sync=True)  # every rank has read its own part of the weights
        if policy.average is not None and not _holds_average(stored):
            policy.average.restart()
    return digests


def _check(policy: Policy, stored: StoredTensors, common: dict[str, Any]) -> None:
    """ValueError where `policy` cannot hold what is stored, or where it is nothing that this program writes."""
    folder = stored.folder
    if stored.objects:
        raise ValueError(f"{folder / '.metadata'}: entry {stored.objects[0]!r} is a pickled object; allowed: tensors")
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


def _read(
    policy: Policy, models: dict[str, Any], common: dict[str, Any], stored: StoredTensors, reader: HashingReader
) -> dict[str, Any]:
    """Read what `_pieces_to_write` listed, in its order. Own ranges go to their place; the rest is returned, merged
    with `common`."""
    described = sharded_by_parameter(models)
    for own in own_ranges(policy.optimizer):
        sharded = described[own.parameter]
        states = {name: torch.empty(values.shape, dtype=values.dtype) for name, values in own.states().items()}
        for name, values in states.items():
            _fill(range_pieces(sharded, values, own.start, f"{STATE}{name}."), stored, reader)
        own.set_states(states)
        _fill(range_pieces(sharded, own.weight, own.start), stored, reader)
    if _holds_average(stored):
        _fill(_average_pieces(policy, described), stored, reader)
    state = undivided_state(policy, models, loading=True)
    same_layout = {"cp": 1} | common["layout"] == _layout(policy)  # the key is younger than the format
    if not same_layout:
        del state["rng"]
    if not same_layout or not any(key.startswith("fp8.") for key in stored.shapes):
        state.pop("fp8", None)  # as at the start of a run
    rest, nonpersistent, factories = load_preprocess(state)
    rest, _ = extract_sharded_base(rest)

    def values_of(sharded: ShardedTensor) -> torch.Tensor:
        values = torch.empty(sharded.local_shape, dtype=sharded.dtype)
        _fill([whole_piece(replace(sharded, data=values))], stored, reader)
        return values

    dict_list_map_inplace(values_of, rest)
    merge(common, nonpersistent)
    merge(common, rest)
    apply_factory_merges(common, factories)
    return common


def _holds_average(stored: StoredTensors) -> bool:
    return any(key.startswith(f"{STATE}average.") for key in stored.shapes)


def _fill(pieces: Iterable[Piece], stored: StoredTensors, reader: HashingReader) -> None:
    """Read the pieces' values into their place. ValueError where the checkpoint is of another model."""
    for piece in pieces:
        shape = stored.shapes.get(piece.key)
        if shape is None:
            raise ValueError(f"the checkpoint is of another model: it lacks {piece.key}")
        if shape != piece.shape and not (piece.padded and shape[1:] == piece.shape[1:]):
            raise ValueError(f"shape mismatch: {piece.key} is {list(shape)} there and {list(piece.shape)} here")
        rows = max(0, min(shape[0] - piece.offsets[0], piece.values.shape[0]))
        if rows:
            reader.read_into(piece.values[:rows], piece.key, piece.offsets)
        piece.values[rows:] = 0  # padding that the layout which saved did not have


def _restore_rest(policy: Policy, loaded: dict[str, Any]) -> None:
    """Put into the policy what is not its own ranges: buffers, schedule, RNG, FP8's scales; and all of a model and an
    optimizer that are not divided."""
    divided = divided_parameters(policy.optimizer)
    for i, chunk in enumerate(policy.chunks):
        _load_model(chunk, loaded.get(f"model{i}", {}), {name for name, p in chunk.named_parameters() if p in divided})
    if not distributed_parts(policy.optimizer):
        policy.optimizer.load_state_dict(loaded["optimizer"])
    for part in optimizer_parts(policy.optimizer):
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            part.optimizer._sync_hdo_state_to_sub_optimizers()
    separate_steps(policy)
    policy.schedule.num_steps = 0  # Megatron adds the loaded count to it
    policy.schedule.load_state_dict(loaded["schedule"])
    for name, tensor in fp8_history(policy.chunks).items() if "fp8" in loaded else ():
        tensor.copy_(loaded["fp8"][name][0])
    if "rng" in loaded:
        _set_rng(loaded["rng"])


def _load_model(chunk: torch.nn.Module, state: dict[str, Any], done: AbstractSet[str] = frozenset()) -> None:
    """Every tensor of `state` and no other, besides those that are `done`; Transformer Engine's extra state, pickled,
    is neither saved nor wanted."""
    missing, unexpected = chunk.load_state_dict(state, strict=False)
    missing = [name for name in missing if name not in done and not name.endswith(EXTRA_STATE)]
    if missing or unexpected:
        raise ValueError(f"the checkpoint is of another model: it lacks {missing} and has {list(unexpected)} besides")


def _settings(policy: Policy) -> dict[str, Any]:
    """Return the settings that decide the form of the optimizer state."""
    return policy.config.policy.model_dump(include={"precision", "use_distributed_optimizer"})


def _layout(policy: Policy) -> dict[str, int]:
    at = policy.layout
    sizes = {"world": at.world_size, "tp": at.tp.size, "pp": at.pp.size, "dp": at.dp.size, "ep": at.ep_size}
    return sizes | {"cp": at.cp.size, "vpp": at.vpp_size or 1}


def _set_rng(states: dict[str, torch.Tensor]) -> None:
    states = {name: state[0] for name, state in states.items()}
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    prefix = "tracker."
    trackers = {name.removeprefix(prefix): state for name, state in states.items() if name.startswith(prefix)}
    get_cuda_rng_tracker().set_states(trackers)
