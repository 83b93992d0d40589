"""Writing a model folder in Hugging Face format bucket by bucket; it gets its name only when it is whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_nft.file_array import names_file
from megatron_nft.files import publish_folder
from megatron_nft.weights.buckets import Bucket, TensorMeta
from megatron_nft.weights.hf_folder import DTYPES, INDEX_NAME

CARRIED = ("*.json", "*.txt", "*.jinja", "*.model", "LICENSE*")
"""Files of the source folder that are copied; weights, their index and code are not."""
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def split_into_files(buckets: Sequence[list[TensorMeta]], max_file_bytes: int) -> list[list[TensorMeta]]:
    """Return the tensors of each file: buckets in order share one up to `max_file_bytes`, a larger one has its own."""
    files: list[list[TensorMeta]] = []
    free_bytes = 0
    for metas in buckets:
        if not files or metas[-1].end > free_bytes:
            files.append([])
            free_bytes = max_file_bytes
        files[-1] += metas
        free_bytes -= metas[-1].end
    return files


def file_names(count: int) -> list[str]:
    """Return the names of `count` safetensors files, as Hugging Face's own are named."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def write_file(path: Path, metas: Sequence[TensorMeta], buckets: Iterator[Bucket]) -> None:
    """Write one safetensors file (8 bytes of header length, JSON header, data), flushed to disk.

    The header is written first; the data are the buffers of the next buckets as they are, since a bucket's tensors
    stand in it without gaps. RuntimeError where the stream does not bring exactly `metas`.
    """
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for meta in metas:
        end = offset + meta.end - meta.start
        header[meta.name] = {
            "dtype": _DTYPE_NAMES[meta.dtype],
            "shape": list(meta.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    missing = len(metas)
    with names_file(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while missing:
            bucket = next(buckets)
            expected = metas[len(metas) - missing :][: len(bucket.metas)]
            if [m.name for m in bucket.metas] != [m.name for m in expected]:
                raise RuntimeError(f"{path.name}: the stream brought {bucket.metas[0].name} out of order")
            file.write(bucket.flat.cpu().numpy().data)
            missing -= len(bucket.metas)
            del bucket  # before the next one is made
        file.flush()
        os.fsync(file.fileno())


def open_partial(out: Path, replace: bool) -> Path:
    """Make the folder that is filled in place of `out`. FileExistsError where that exists and may not be."""
    if out.exists() and not replace:
        raise FileExistsError(f"{out} exists already; choose another folder or remove it")
    partial = partial_of(out)
    if partial.exists():  # left by an interrupted run
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def partial_of(out: Path) -> Path:
    """Return the folder that is filled in place of `out`."""
    return out.with_name(out.name + ".partial")


def finish_folder(
    out: Path,
    source: Path,
    file_of: dict[str, str],
    total_bytes: int,
    dtype: torch.dtype,
    chat_template: Path | None = None,
) -> None:
    """Add index, config and tokenizer to the partial folder and give it its name; an existing `out` is replaced."""
    partial = partial_of(out)
    carry_files(source, partial, dtype)
    if chat_template is not None:
        shutil.copyfile(chat_template, partial / "chat_template.jinja")
    if len(set(file_of.values())) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(file_of.items()))}
        (partial / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    publish_folder(partial, out)


def carry_files(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy config, generation config, tokenizer and chat template; the config's dtype becomes that of the tensors."""
    for path in sorted({p for pattern in CARRIED for p in source.glob(pattern)}):
        if path.is_file() and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
