"""Finding the data of a tensor that torch.save wrote into the middle of a file, without reading the data.

torch.save writes a zip: `data.pkl` says dtype, shape and strides, `data/0` has the bytes as they are.
"""

from __future__ import annotations

import collections
import io
import mmap
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_nft.file_array import FileArray

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LOCAL_HEADER = 30  # bytes; the lengths of name and extra field are its last two pairs


class _TensorRecord(NamedTuple):
    """What the pickle of a tensor says about it."""

    dtype: torch.dtype
    record: str  # the name of its storage's file in the zip
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def find_item(path: Path, start: int, length: int) -> tuple[FileArray, tuple[int, ...]]:
    """Return (array, order): axis i of the array is axis order[i] of the tensor; torch.save keeps the order of memory.

    `start`, `length`: where the zip lies in the file, bytes. ValueError where it is damaged or holds anything but one
    dense tensor.
    """
    with path.open("rb") as file:
        array, order = find_array(Window(file, start, length), path, start)
    return replace(array, offset=start + array.offset), order


def find_array(item: Window, path: Path, start: int) -> tuple[FileArray, tuple[int, ...]]:
    """The same for an `item` that is read already; the array's offset counts from the start of the item.

    `path`, `start`: where it came from.
    """
    try:
        archive = zipfile.ZipFile(item)
        root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
        found = _TensorUnpickler(io.BytesIO(archive.read(root + "data.pkl"))).load()
        if not isinstance(found, _TensorRecord):
            raise pickle.UnpicklingError(f"it is a {type(found).__name__}")
        dtype, record, offset, shape, strides = found
        stored = archive.getinfo(f"{root}data/{record}")
    except (zipfile.BadZipFile, StopIteration, KeyError) as error:
        raise ValueError(f"{path} is cut off or damaged at {start}: {error}") from None
    except (pickle.UnpicklingError, TypeError) as error:
        raise ValueError(f"{path} at {start} holds no plain tensor: {error}") from None
    item.seek(stored.header_offset + _LOCAL_HEADER - 4)
    names = sum(int.from_bytes(item.read(2), "little") for _ in range(2))
    order = tuple(sorted(range(len(shape)), key=lambda axis: (-strides[axis], axis)))
    dense, expected = 1, []
    for axis in reversed(order):
        expected.append(dense)
        dense *= shape[axis]
    if any(shape[axis] > 1 and strides[axis] != step for axis, step in zip(reversed(order), expected, strict=True)):
        raise ValueError(f"{path} at {start}: a tensor of shape {shape} with strides {strides} is not read")
    begin = stored.header_offset + _LOCAL_HEADER + names + offset * dtype.itemsize
    return FileArray(path, begin, dtype, tuple(shape[axis] for axis in order)), order


class Window(io.RawIOBase):
    """A part of a file, or of memory, read as a file."""

    def __init__(self, file: io.BufferedIOBase | mmap.mmap, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError(f"position {base + offset} lies before the part")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._start + self._at)
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _TensorUnpickler(pickle.Unpickler):
    """Reads the description of one tensor; no other name is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it wants {module}.{name}")

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, str]:
        _, dtype, record, _, _ = pid
        return dtype, record


def _rebuild_tensor(
    storage: tuple[torch.dtype, str], offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> _TensorRecord:
    return _TensorRecord(*storage, offset, tuple(shape), tuple(strides))
