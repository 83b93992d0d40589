"""Conversions between Hugging Face folders and Megatron checkpoints, streamed by one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from megatron_nft.console import SILENT, Progress
from megatron_nft.files import publish_folder
from megatron_nft.policy.checkpoint_writer import StoredTensor
from megatron_nft.policy.family import ModelSpec, read_family
from megatron_nft.weights.buckets import Bucket, TensorMeta
from megatron_nft.weights.hf_check import check_folder
from megatron_nft.weights.hf_folder import HFFolder
from megatron_nft.weights.hf_writer import (
    carry_files,
    file_names,
    finish_folder,
    open_partial,
    split_into_files,
    write_file,
)
from megatron_nft.weights.names import Kind, Place, all_places
from megatron_nft.weights.offline.megatron_reader import HF_FILES, MegatronCheckpoint, MegatronWeights, megatron_shape
from megatron_nft.weights.offline.megatron_writer import StoredBox, TargetLayout, boxes, write_checkpoint
from megatron_nft.weights.offline.reused_memory import ReusedMemory
from megatron_nft.weights.offline.summary import ConversionSummary, WrittenTensor
from megatron_nft.weights.splits import unmerge

STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def hf_to_megatron(
    source: Path, out: Path, grid: TargetLayout, dtype: torch.dtype | None = None, progress: Progress = SILENT
) -> ConversionSummary:
    """Write the HF folder `source` as a weights-only checkpoint `out`, with config and tokenizer in `out`/hf.

    dtype: of the checkpoint; None keeps the folder's. ValueError before anything is written where folder and config
    disagree or `grid` does not divide the model. Held at a time: one rank's part of one Megatron parameter, of gate and
    up one of the two.
    """
    spec, folder = read_family(source), HFFolder(source)
    grid.check(spec)
    check_folder(folder, spec)
    dtypes = {} if dtype else _stored_dtypes(folder, spec)
    partial = open_partial(out, replace=False)
    stored: dict[str, StoredTensor] = {}
    ranks: list[list[StoredBox]] = [[] for _ in range(grid.tp * grid.pp)]
    for place in all_places(spec):
        if place.row.tied_copy:
            continue
        shape = list(megatron_shape(place, spec))
        if place.row.kind is Kind.VOCAB:
            shape[0] = spec.padded_vocab_size(grid.tp)
        lead = _lead(place, spec)
        for key in place.row.stored_keys:
            stored[key] = StoredTensor(tuple(n for _, n in lead) + tuple(shape), dtype or dtypes[key])
            for tp_rank, offsets, sizes in boxes(place.row.kind, shape, grid.tp):
                fill = _filler(folder, spec, place, offsets, sizes)
                piece = StoredBox(key, tuple(i for i, _ in lead) + offsets, (1,) * len(lead) + sizes, fill)
                ranks[grid.stage(place, spec.num_layers) * grid.tp + tp_rank].append(piece)
    summary = ConversionSummary([WrittenTensor(key, s.shape, s.dtype) for key, s in stored.items()], len(ranks))
    progress.expect(summary.nbytes)
    write_checkpoint(partial, stored, ranks, {"content_metadata": {}}, progress)
    (partial / HF_FILES).mkdir()
    carry_files(source, partial / HF_FILES, next(iter(stored.values())).dtype)
    publish_folder(partial, out)
    return summary


def _stored_dtypes(folder: HFFolder, spec: ModelSpec) -> dict[str, torch.dtype]:
    """Return the dtype of every key. ValueError where a checkpoint cannot hold it, or HF tensors of a key differ."""
    first: dict[str, str] = {}  # key -> the first of its HF tensors
    for place in all_places(spec):
        for key in () if place.row.tied_copy else place.row.stored_keys:
            for name in place.hf_names:
                known = first.setdefault(key, name)
                if folder.dtypes[name] not in STORED_DTYPES:
                    raise ValueError(
                        f"{folder.path}: {name} is {folder.dtypes[name]}; a checkpoint holds float32, bfloat16 or "
                        "float16: choose one with --dtype"
                    )
                if folder.dtypes[name] is not folder.dtypes[known]:
                    raise ValueError(
                        f"{folder.path}: {known} is {folder.dtypes[known]} and {name} {folder.dtypes[name]}, but "
                        f"Megatron keeps both in {key}; choose one with --dtype"
                    )
    return {key: folder.dtypes[name] for key, name in first.items()}


def _lead(place: Place, spec: ModelSpec) -> list[tuple[int, int]]:
    """Return (index, length) of the axes along which a key stacks layers and experts."""
    lead = [(place.layer, spec.num_layers), (place.expert, spec.num_experts)]
    return [(i, n) for i, n in lead if i is not None]


def _filler(
    folder: HFFolder, spec: ModelSpec, place: Place, offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> Callable[[torch.Tensor], None]:
    """Return a function that reads one box of a Megatron parameter from the folder."""
    kind, shapes = place.row.kind, place.hf_shapes(spec)
    arrays = [folder.array(name) for name in place.hf_names]

    def fill(piece: torch.Tensor) -> None:
        target = piece.view(sizes)
        if kind is Kind.GATE_UP:  # a piece lies in one of the two
            half, row = divmod(offsets[0], shapes[0][0])
            arrays[half].read_into(target, (slice(row, row + sizes[0]), slice(0, sizes[1])))
        elif kind is Kind.QKV:  # a piece is a run of key/value groups
            for array, part in zip(arrays, unmerge(kind, target, spec), strict=True):
                groups, *rest = part.shape
                first = offsets[0] * groups // sizes[0]
                index = (slice(first, first + groups), *(slice(0, n) for n in rest))
                array.view(spec.num_query_groups, *rest).read_into(part, index)
        else:
            index = tuple(slice(min(o, m), min(o + n, m)) for o, n, m in zip(offsets, sizes, shapes[0], strict=True))
            real = index[0].stop - index[0].start
            arrays[0].read_into(target[:real], index)
            target[real:] = 0  # rows that pad the vocabulary

    return fill


def megatron_to_hf(
    source: Path,
    out: Path,
    hf_files: Path | None = None,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = 5 << 30,
    progress: Progress = SILENT,
) -> ConversionSummary:
    """Write a checkpoint's weights as the HF folder `out`.

    hf_files: where config and tokenizer come from; None takes those that the checkpoint carries or, for a run's
    checkpoint, the run's model.path. dtype: None keeps the checkpoint's; float32 takes the optimizer's fp32 master
    weights where the checkpoint has them. Held at a time: one Megatron parameter; of attention, one HF tensor more.
    """
    checkpoint = MegatronCheckpoint(source)
    carried = hf_files or find_hf_files(checkpoint)
    spec = read_family(carried)
    weights = MegatronWeights(checkpoint, spec, masters=dtype is torch.float32)
    metas = [_metas(place, spec, dtype or weights.dtypes[place.hf_names[0]]) for place in weights.places]
    files = split_into_files([[meta] for of_place in metas for meta in of_place], max_file_bytes)
    names = file_names(len(files))
    partial = open_partial(out, replace=False)
    summary = ConversionSummary(
        [WrittenTensor(m.name, m.shape, m.dtype) for of_file in files for m in of_file], len(files)
    )
    progress.expect(summary.nbytes)
    stream = _buckets(weights, spec, metas, progress)
    for name, of_file in zip(names, files, strict=True):
        write_file(partial / name, of_file, stream)
    file_of = {meta.name: name for name, of_file in zip(names, files, strict=True) for meta in of_file}
    finish_folder(out, carried, file_of, summary.nbytes, metas[0][0].dtype)
    return summary


def find_hf_files(checkpoint: MegatronCheckpoint) -> Path:
    """Return the folder with the checkpoint's config and tokenizer. ValueError where none is known."""
    if (checkpoint.folder / HF_FILES / "config.json").is_file():
        return checkpoint.folder / HF_FILES
    settings = checkpoint.path.parent.parent / "config.yaml"  # run_dir/checkpoints/step_.../
    if settings.is_file():
        from megatron_nft.config import load_config

        path = load_config([settings], []).model.path
        if (path / "config.json").is_file():
            return path
        raise ValueError(f"{settings} names model.path={path}, which has no config.json; give the folder with --hf")
    raise ValueError(f"{checkpoint.path} carries no config and tokenizer; name their folder with --hf")


def _metas(place: Place, spec: ModelSpec, dtype: torch.dtype) -> list[TensorMeta]:
    return [
        TensorMeta(name, shape, dtype, 0, math.prod(shape) * dtype.itemsize)
        for name, shape in zip(place.hf_names, place.hf_shapes(spec), strict=True)
    ]


def _buckets(
    weights: MegatronWeights, spec: ModelSpec, metas: list[list[TensorMeta]], progress: Progress
) -> Iterator[Bucket]:
    """Yield one bucket per HF tensor, valid until the next."""
    whole = ReusedMemory(max(sum(meta.end for meta in of_place) for of_place in metas))
    part_of_qkv = ReusedMemory(
        max(m.end for p, of in zip(weights.places, metas, strict=True) if p.row.kind is Kind.QKV for m in of)
    )
    for place, of_place in zip(weights.places, metas, strict=True):
        parameter = whole.tensor(megatron_shape(place, spec), of_place[0].dtype)
        weights.read_parameter_into(parameter, place)
        for meta, part in zip(of_place, unmerge(place.row.kind, parameter, spec), strict=True):
            if not part.is_contiguous():  # a part of QKV lies there group by group
                part = part_of_qkv.tensor(part.shape, part.dtype).copy_(part)
            progress.advance(part.nbytes, meta.name)
            yield Bucket([meta], part.reshape(-1).view(torch.uint8))
