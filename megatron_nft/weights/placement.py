"""The Megatron parameters that this rank holds, each with its place in the whole model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from megatron_nft.policy.model import PolicyModel, unwrap
from megatron_nft.policy.parallel import ParallelLayout
from megatron_nft.weights.names import Geometry, Place, all_places, place_of


@dataclass(frozen=True, slots=True)
class Held:
    """One parameter on this rank."""

    place: Place
    parameter: torch.nn.Parameter  # this rank's shard


def held_parameters(chunks: Sequence[torch.nn.Module], geometry: Geometry, layout: ParallelLayout) -> list[Held]:
    """Return every parameter of this rank's model chunks, in the order of a forward pass.

    ValueError for a parameter that the name table does not know.
    """
    held = [Held(place_of(name, geometry), p) for chunk in chunks for name, p in _named_globally(unwrap(chunk), layout)]
    order = {place: i for i, place in enumerate(all_places(geometry))}
    return sorted(held, key=lambda h: order[h.place])


_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(?<=experts\.local_experts\.)\d+|(?<=weight)\d+$")


def _named_globally(model: PolicyModel, layout: ParallelLayout) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the parameters by name, with layers and experts numbered over the whole model instead of over this rank."""
    experts_before = (model.config.num_moe_experts or 0) // layout.ep_size * layout.ep_rank
    for name, parameter in model.named_parameters():
        layer = _LAYER.match(name)
        if layer:
            number = model.decoder.layers[int(layer[1])].layer_number - 1
            name = f"decoder.layers.{number}." + name[layer.end() :]
        if ".experts." in name:
            name = _EXPERT.sub(lambda index: str(experts_before + int(index[0])), name)
        yield name, parameter


def split_of(place: Place, layout: ParallelLayout) -> tuple[int, int]:
    """Return (rank, size) in the group that divides this parameter: tensor parallel, or expert tensor parallel."""
    if place.row.expert:
        return (
            parallel_state.get_expert_tensor_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )
    return layout.tp.rank, layout.tp.size
