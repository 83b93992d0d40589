"""A model folder in Hugging Face format, read slice by slice. Only safetensors: nothing is unpickled."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_nft.file_array import BLOCK_BYTES, FileArray

INDEX_NAME = "model.safetensors.index.json"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class HFFolder:
    """Names, shapes and dtypes of all tensors of a folder, from the file headers; data are read on demand.

    ValueError where the folder has no safetensors, lacks a file of its index or has a damaged one, or where the index
    and the files disagree.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        listed = self._read_index()
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            found = sorted(p.name for p in self.path.glob("*.bin"))
            hint = f"; it has {', '.join(found[:3])}, which are pickles and are not read" if found else ""
            raise ValueError(f"{self.path} holds no *.safetensors file{hint}")
        self._files: dict[str, Path] = {}
        self._offsets: dict[str, int] = {}  # of the data in its file, bytes
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for file in files:
            self._read_header(file)
        wrong = [name for name, file in listed.items() if name not in self._files or self._files[name].name != file]
        if wrong:
            raise ValueError(f"{self.path / INDEX_NAME} lists tensors that its files do not hold: {name_list(wrong)}")

    def _read_header(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - a safetensors handle, not a dict
                    if name in self._files:
                        raise ValueError(f"{name} stands in two files: {self._files[name].name} and {file.name}")
                    view = tensors.get_slice(name)
                    self._files[name] = file
                    self.shapes[name] = tuple(view.get_shape())
                    if view.get_dtype() not in DTYPES:
                        raise ValueError(f"{file}: {name} is {view.get_dtype()}; known: {', '.join(DTYPES)}")
                    self.dtypes[name] = DTYPES[view.get_dtype()]
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or cut off: {error}") from None
        with file.open("rb") as plain:  # safe_open has checked the header, but does not tell where the data lie
            size = int.from_bytes(plain.read(8), "little")
            header = json.loads(plain.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                self._offsets[name] = 8 + size + entry["data_offsets"][0]

    def _read_index(self) -> dict[str, str]:
        """Return the file of every tensor by the index, {} without one. ValueError where files are not there, which a
        download that stopped half-way leaves."""
        index = self.path / INDEX_NAME
        if not index.is_file():
            return {}
        try:
            listed: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            missing = sorted(file for file in set(listed.values()) if not (self.path / file).is_file())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index} is no index of safetensors: {type(error).__name__}: {error}") from None
        if missing:
            raise ValueError(
                f"model folder {self.path} is incomplete: {len(missing)} of {len(set(listed.values()))} weight files "
                f"are missing ({name_list(missing, 4)}); download or export it again"
            )
        return listed

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        """Read one tensor, or the part of it at `index`. The file is mapped only while this runs."""
        with safe_open(self._files[name], framework="pt") as tensors:
            value: torch.Tensor = tensors.get_tensor(name) if index is None else tensors.get_slice(name)[index]
            return value

    def array(self, name: str) -> FileArray:
        """Return a tensor's place in its file, to be read part by part."""
        return FileArray(self._files[name], self._offsets[name], self.dtypes[name], self.shapes[name])

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors have the same shape and values, compared block by block."""
        if self.shapes[name] != self.shapes[other]:
            return False
        count = math.prod(self.shapes[name])
        arrays = [self.array(n).view(count) for n in (name, other)]
        step = BLOCK_BYTES // 8
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            values = [torch.empty(part.stop - start, dtype=array.dtype) for array in arrays]
            for value, array in zip(values, arrays, strict=True):
                array.read_into(value, (part,))
            if not torch.equal(*values):
                return False
        return True


def name_list(names: Iterable[str], limit: int = 10) -> str:
    """Join names for an error message: `a, b, c and 7 more`."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more
