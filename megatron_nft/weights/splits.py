"""Where a tensor-parallel rank's part lies in a full HF tensor, and how parts are merged into Megatron's parameter.

Import and export are the same two functions in the two directions: `region` finds the rank's part of each HF tensor,
`merge` / `unmerge` turn those parts into the rank's Megatron parameter and back.

Legend: G key/value groups on this rank, d head size, H hidden size, tp tensor-parallel size.
"""

from __future__ import annotations

import torch

from megatron_nft.weights.names import Geometry, Kind


def region(kind: Kind, shape: tuple[int, ...], rank: int, size: int, padded_rows: int = 0) -> tuple[slice, ...]:
    """Return the index of the part that `rank` of `size` holds in a full HF tensor of `shape`.

    `padded_rows` (VOCAB): rows of one rank's parameter; the last ranks may hold fewer real rows, or none.
    ValueError where the size does not divide the axis.
    """
    if kind is Kind.REPLICATED or size == 1:
        return tuple(slice(0, n) for n in shape)
    axis = 1 if kind is Kind.ROW else 0
    if kind is Kind.VOCAB:
        start, stop = rank * padded_rows, (rank + 1) * padded_rows
    elif shape[axis] % size:
        raise ValueError(f"tensor parallel size {size} does not divide axis {axis} of shape {list(shape)}")
    else:
        width = shape[axis] // size
        start, stop = rank * width, (rank + 1) * width
    return tuple(slice(min(start, n), min(stop, n)) if i == axis else slice(0, n) for i, n in enumerate(shape))


def merge(kind: Kind, parts: list[torch.Tensor], geometry: Geometry) -> torch.Tensor:
    """Merge the HF parts of one rank into its Megatron parameter.

    QKV: q [G*(heads per group)*d, H], k and v [G*d, H] -> [G*(heads per group + 2)*d, H].
    """
    if kind is Kind.GATE_UP:
        return torch.cat(parts)
    if kind is Kind.QKV:
        groups = parts[1].shape[0] // geometry.kv_channels
        return torch.cat([p.reshape(groups, -1, *p.shape[1:]) for p in parts], dim=1).flatten(0, 1)
    return parts[0]


def unmerge(kind: Kind, parameter: torch.Tensor, geometry: Geometry) -> list[torch.Tensor]:
    """Undo `merge`, in views. QKV parts come as [G, rows per group, ...]: reshape joins the first two."""
    if kind is Kind.GATE_UP:
        return list(parameter.chunk(2))
    if kind is Kind.QKV:
        heads_per_group = geometry.num_attention_heads // geometry.num_query_groups
        d = geometry.kv_channels
        grouped = parameter.view(-1, (heads_per_group + 2) * d, *parameter.shape[1:])
        return list(torch.split(grouped, [heads_per_group * d, d, d], dim=1))
    return [parameter]


def place(target: torch.Tensor, index: tuple[slice, ...], part: torch.Tensor) -> torch.Tensor:
    """Return a view [n, ...] of where an unmerged part, or rows of it, belongs in the full HF tensor `target`.

    n may be less than the part has, since the rows that pad the vocabulary have no place.
    """
    found = target[index]
    return found.view(-1, *part.shape[1:]) if part.dim() > target.dim() else found  # QKV: [G, rows, ...]
