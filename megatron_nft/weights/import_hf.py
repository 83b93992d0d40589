"""Loading a Hugging Face folder into this rank's Megatron shards; only the slices that the rank needs are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_nft.policy.parallel import ParallelLayout
from megatron_nft.weights.hf_folder import HFFolder, name_list
from megatron_nft.weights.names import Geometry, Kind, hf_shapes
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


def check_folder(folder: HFFolder, geometry: Geometry) -> None:
    """Compare a folder's tensors with what its config promises; ValueError names every difference."""
    expected, found = hf_shapes(geometry), dict(folder.shapes)
    if geometry.tied and "lm_head.weight" in found:
        del found["lm_head.weight"]  # some folders store the tied output layer a second time
        if "model.embed_tokens.weight" in found and not folder.equal("lm_head.weight", "model.embed_tokens.weight"):
            raise ValueError(
                f"{folder.path}: config.json says tie_word_embeddings, "
                "but lm_head.weight differs from model.embed_tokens.weight"
            )
    problems = []
    if missing := expected.keys() - found.keys():
        problems.append(f"lacks {name_list(missing)}")
    if unknown := found.keys() - expected.keys():
        problems.append(f"holds tensors that family {geometry.family!r} does not know: {name_list(unknown)}")
    problems += [
        f"{name} has shape {list(found[name])}, but config.json makes it {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ][:10]
    if problems:
        raise ValueError(f"{folder.path} " + "; ".join(problems))


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
