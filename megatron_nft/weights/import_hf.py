"""Loading a Hugging Face folder into this rank's Megatron shards; only the slices that the rank needs are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_nft.policy.parallel import ParallelLayout
from megatron_nft.weights.hf_check import check_folder
from megatron_nft.weights.hf_folder import HFFolder
from megatron_nft.weights.names import Geometry, Kind
from megatron_nft.weights.placement import Held, held_parameters, split_of
from megatron_nft.weights.splits import merge, region


@torch.no_grad()
def load_hf(chunks: Sequence[torch.nn.Module], model_path: Path | str, spec: Geometry, layout: ParallelLayout) -> None:
    """Fill every parameter of `chunks` from the safetensors of `model_path`.

    Raises ValueError, before anything is written, where the folder lacks a tensor that the config promises, holds one
    that the family does not know, or a shape differs from the config's. Peak extra memory: one Megatron parameter.
    """
    folder = HFFolder(model_path)
    check_folder(folder, spec)
    for held in held_parameters(chunks, spec, layout):
        held.parameter.copy_(_local_value(held, folder, spec, layout))


def _local_value(held: Held, folder: HFFolder, geometry: Geometry, layout: ParallelLayout) -> torch.Tensor:
    """Read this rank's shard of one parameter, in the folder's dtype."""
    kind, target = held.place.row.kind, held.parameter
    rank, size = split_of(held.place, layout)
    names, shapes = held.place.hf_names, held.place.hf_shapes(geometry)
    parts = [folder.read(n, region(kind, s, rank, size, target.shape[0])) for n, s in zip(names, shapes, strict=True)]
    value = merge(kind, parts, geometry)
    if kind is Kind.VOCAB and value.shape[0] < target.shape[0]:  # padded vocabulary
        padding = value.new_zeros(target.shape[0] - value.shape[0], *value.shape[1:])
        value = torch.cat([value, padding])
    if value.shape != target.shape:
        raise ValueError(
            f"{' + '.join(names)}: this rank's part has shape {list(value.shape)}, "
            f"the Megatron parameter {list(target.shape)}"
        )
    return value
