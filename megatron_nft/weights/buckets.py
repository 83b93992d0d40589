"""How a pipeline stage's parameters are grouped into buckets, and which ranks hold their shards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_nft.policy.parallel import ParallelLayout
from megatron_nft.weights.names import Geometry, Kind, ParameterRow, Place
from megatron_nft.weights.placement import Held, held_parameters


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """Where one HF tensor lies in a bucket's buffer."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int  # bytes
    end: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """Full HF tensors in one buffer, without gaps; valid until the next bucket is asked for."""

    metas: list[TensorMeta]
    flat: torch.Tensor  # uint8 [nbytes]
    own: bool = True  # put together on this rank, rather than received from another stage's leader

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.flat.numel()

    @property
    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """(HF name, view of `flat`) of each tensor."""
        return [(m.name, self.flat[m.start : m.end].view(m.dtype).view(m.shape)) for m in self.metas]


@dataclass(frozen=True, slots=True)
class Entry:
    """One Megatron parameter of this stage, wherever its shards are."""

    place: Place
    dtype: torch.dtype  # as exported
    shard_shape: torch.Size
    sources: tuple[int, ...]  # ranks of the gathering group that hold shard 0, 1, ...
    parameter: torch.nn.Parameter | None  # the shard, where this rank has one

    @property
    def shard(self) -> torch.Tensor:
        """This rank's shard, without its gradient. RuntimeError where the rank has none."""
        if self.parameter is None:
            raise RuntimeError(f"this rank holds no shard of {', '.join(self.place.hf_names)}")
        return self.parameter.detach()

    def hf_bytes(self, geometry: Geometry) -> int:
        """Bytes of the full HF tensors that the parameter holds, as exported."""
        return sum(math.prod(s) for s in self.place.hf_shapes(geometry)) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class BucketPlan:
    """What the ranks of a stage do for one bucket. All of them compute the same plan from their own chunks."""

    entries: list[Entry]
    metas: list[TensorMeta]
    group: dist.ProcessGroup  # ranks that hold shards; its rank 0 is the stage leader where `gathers`
    gathers: bool  # this rank takes part

    @property
    def nbytes(self) -> int:
        """Bytes of the bucket."""
        return self.metas[-1].end

    def shards_of(self, group_rank: int) -> list[Entry]:
        """Return the parameters of which a rank of `group` holds a shard, in the order of the bucket."""
        return [e for e in self.entries if group_rank in e.sources]


def plan_stage(
    chunks: Sequence[torch.nn.Module],
    geometry: Geometry,
    layout: ParallelLayout,
    bucket_bytes: int,
    dtype: torch.dtype | None,
) -> list[BucketPlan]:
    """Return the buckets of this rank's pipeline stage: dense parameters first, then experts."""
    if bucket_bytes <= 0:
        raise ValueError(f"bucket_bytes={bucket_bytes}: must be positive")
    held = [h for h in held_parameters(chunks, geometry, layout) if not h.place.row.tied_copy]
    dense = [_dense_entry(h, layout.tp.size, dtype) for h in held if not h.place.row.expert]
    experts = _expert_entries([h for h in held if h.place.row.expert], layout, dtype)
    plans = _group(dense, geometry, bucket_bytes, layout.tp.group, layout.dp.rank == layout.cp.rank == 0)
    if experts:
        group = parallel_state.get_expert_tensor_and_model_parallel_group()
        gathers = parallel_state.get_expert_data_parallel_rank() == 0
        plans += _group(experts, geometry, bucket_bytes, group, gathers)
    return plans


def _dense_entry(held: Held, tp_size: int, dtype: torch.dtype | None) -> Entry:
    sources = (0,) if held.place.row.kind is Kind.REPLICATED else tuple(range(tp_size))
    return Entry(held.place, dtype or held.parameter.dtype, held.parameter.shape, sources, held.parameter)


def _expert_entries(held: list[Held], layout: ParallelLayout, dtype: torch.dtype | None) -> list[Entry]:
    """Return entries for the experts of all expert-parallel ranks, in the order of a forward pass."""
    etp_size = parallel_state.get_expert_tensor_parallel_world_size()
    by_matrix: dict[tuple[int | None, ParameterRow], list[Held]] = {}
    for h in held:
        by_matrix.setdefault((h.place.layer, h.place.row), []).append(h)
    entries = []
    for (layer, row), local in by_matrix.items():
        for owner in range(layout.ep_size):
            sources = tuple(owner * etp_size + shard for shard in range(etp_size))
            for i, h in enumerate(local):
                place = Place(row, layer, owner * len(local) + i)
                parameter = h.parameter if owner == layout.ep_rank else None
                entries.append(Entry(place, dtype or h.parameter.dtype, h.parameter.shape, sources, parameter))
    return entries


def _group(
    entries: list[Entry], geometry: Geometry, bucket_bytes: int, group: dist.ProcessGroup, gathers: bool
) -> list[BucketPlan]:
    """Fill buckets in order; one dtype per bucket, so that every tensor is aligned without padding."""
    buckets: list[list[Entry]] = []
    free_bytes = 0
    for entry in entries:
        nbytes = entry.hf_bytes(geometry)
        if not buckets or nbytes > free_bytes or entry.dtype != buckets[-1][-1].dtype:
            buckets.append([])
            free_bytes = bucket_bytes
        buckets[-1].append(entry)
        free_bytes -= nbytes
    return [BucketPlan(bucket, _metas(bucket, geometry), group, gathers) for bucket in buckets]


def _metas(entries: list[Entry], geometry: Geometry) -> list[TensorMeta]:
    metas, offset = [], 0
    for entry in entries:
        for name, shape in zip(entry.place.hf_names, entry.place.hf_shapes(geometry), strict=True):
            end = offset + math.prod(shape) * entry.dtype.itemsize
            metas.append(TensorMeta(name, shape, entry.dtype, offset, end))
            offset = end
    return metas
