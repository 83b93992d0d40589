"""Changing the layout of a training checkpoint: every tensor, optimizer state included, is cut for the new ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_nft.console import SILENT, Progress
from megatron_nft.files import publish_folder, sha256_of_file
from megatron_nft.policy.checkpoint_writer import StoredTensor, WrittenFile
from megatron_nft.policy.family import ModelSpec
from megatron_nft.weights.hf_folder import name_list
from megatron_nft.weights.hf_writer import open_partial
from megatron_nft.weights.names import Kind, ParameterRow, Place, all_places
from megatron_nft.weights.offline.megatron_reader import HF_FILES, MegatronCheckpoint, MegatronWeights
from megatron_nft.weights.offline.megatron_writer import StoredBox, TargetLayout, boxes, write_checkpoint
from megatron_nft.weights.offline.summary import ConversionSummary, WrittenTensor


def reshard(source: Path, out: Path, grid: TargetLayout, progress: Progress = SILENT) -> ConversionSummary:
    """Write a training checkpoint, optimizer state included, as ranks of `grid` would have saved it.

    `source` may be a run's `step_...` folder (its manifest, surplus groups and all are carried over) or a bare
    torch_dist folder. Values are copied, so the next optimizer step is the same. States of random generators belong
    to ranks of the old layout and are left out. ValueError, before anything is written, for keys that belong to no
    parameter, weights that are not the config's, and a `grid` that does not divide the model.
    """
    checkpoint = MegatronCheckpoint(source)
    spec = checkpoint.spec()
    grid.check(spec)
    MegatronWeights(checkpoint, spec)  # refuses weights that are not the config's
    if checkpoint.objects:
        raise ValueError(f"{source} holds pickled objects, which are not read: {name_list(checkpoint.objects)}")
    stored, ranks = _plan(checkpoint, spec, grid)
    common = _with_layout(checkpoint.read_common(), grid)
    partial = open_partial(out, replace=False)
    target = partial / "megatron" if checkpoint.folder != checkpoint.path else partial
    target.mkdir(exist_ok=True)
    summary = ConversionSummary([WrittenTensor(key, s.shape, s.dtype) for key, s in stored.items()], len(ranks))
    progress.expect(summary.nbytes)
    files = write_checkpoint(target, stored, ranks, common, progress)
    if target != partial:
        _carry_run_files(checkpoint, partial, grid, files)
    elif (checkpoint.folder / HF_FILES).is_dir():
        shutil.copytree(checkpoint.folder / HF_FILES, partial / HF_FILES)
    publish_folder(partial, out)
    return summary


def _plan(
    checkpoint: MegatronCheckpoint, spec: ModelSpec, grid: TargetLayout
) -> tuple[dict[str, StoredTensor], list[list[StoredBox]]]:
    """Return what is stored, and the boxes of every rank.

    Optimizer states are cut like their parameter; their keys end with its key.
    """
    places = {key: place for place in all_places(spec) for key in place.row.stored_keys}
    stored: dict[str, StoredTensor] = {}
    ranks: list[list[StoredBox]] = [[] for _ in range(grid.tp * grid.pp)]
    for key, shape in checkpoint.shapes.items():
        if key.startswith("rng."):
            continue
        parameter = next((name for name in places if key == name or key.endswith("." + name)), None)
        if parameter is None:
            raise ValueError(f"{checkpoint.path} holds {key}, which belongs to no parameter of family {spec.family!r}")
        row = places[parameter].row
        if row.kind is Kind.VOCAB:  # every TP size has its own padding
            shape = (spec.padded_vocab_size(grid.tp), *shape[1:])
        stored[key] = StoredTensor(shape, checkpoint.dtypes[key])
        for lead in _leading_indices(row, shape):
            place = Place(row, lead[0] if lead else None, lead[1] if len(lead) > 1 else None)
            stage = grid.stage(place, spec.num_layers)
            for tp_rank, offsets, sizes in boxes(row.kind, shape[len(lead) :], grid.tp):
                start = lead + offsets
                piece = StoredBox(key, start, (1,) * len(lead) + sizes, _filler(checkpoint, key, start))
                ranks[stage * grid.tp + tp_rank].append(piece)
    return stored, ranks


def _filler(checkpoint: MegatronCheckpoint, key: str, start: tuple[int, ...]) -> Callable[[torch.Tensor], None]:
    """Return a function that copies the box at `start`; rows beyond the stored ones, which pad a vocabulary, are 0."""

    def fill(piece: torch.Tensor) -> None:
        real = min(piece.shape[0], max(0, checkpoint.shapes[key][0] - start[0]))
        if real:
            checkpoint.read_region_into(piece[:real], key, start)
        piece[real:] = 0

    return fill


def _leading_indices(row: ParameterRow, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    if "{layer}" not in row.megatron[0]:
        return [()]
    if row.expert:
        return [(layer, expert) for layer in range(shape[0]) for expert in range(shape[1])]
    return [(layer,) for layer in range(shape[0])]


def _with_layout(common: dict[str, Any], grid: TargetLayout) -> dict[str, Any]:
    """common.pt with the new layout. `resharded_from` makes it differ from every rank's own, so that a loader does not
    look for generator states."""
    if "layout" in common:
        old = common["layout"]
        world = grid.tp * grid.pp * old.get("cp", 1) * old["dp"]
        new = {"world": world, "tp": grid.tp, "pp": grid.pp, "vpp": grid.vpp}
        common["layout"] = old | new | {"resharded_from": old}
    return common


def _carry_run_files(
    checkpoint: MegatronCheckpoint, partial: Path, grid: TargetLayout, files: Sequence[WrittenFile]
) -> None:
    """Copy surplus groups, and the manifest with the new layout and the new files' sizes and SHA-256."""
    known = {f"megatron/{file.name}": {"bytes": file.nbytes, "sha256": file.sha256} for file in files}
    for path in checkpoint.path.iterdir():
        if path.is_dir() and path != checkpoint.folder:
            shutil.copytree(path, partial / path.name)
    manifest = json.loads((checkpoint.path / "manifest.json").read_text(encoding="utf-8"))
    manifest["layout"] |= {"tp": grid.tp, "pp": grid.pp}
    names = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
    manifest["files"] = {name: known.get(name) or _size_and_digest(partial / name) for name in names}
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _size_and_digest(path: Path) -> dict[str, int | str]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
