"""Reading torch_dist files region by region, whatever layout wrote them.

Tensors are stored by their place in the whole model, in boxes ("chunks"); each box is one tensor that torch.save wrote
into a `*.distcp` file, and `.metadata` says where. Neither is unpickled freely (checkpoint_item.py,
checkpoint_metadata.py).
"""

from __future__ import annotations

import hashlib
import mmap
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_nft.file_array import FileArray, names_file
from megatron_nft.policy.checkpoint_item import Window, find_array, find_item
from megatron_nft.policy.checkpoint_metadata import read_metadata


class StoredTensors:
    """Keys, shapes and regions of a torch_dist folder. ValueError where it is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        metadata = self._read_metadata()
        entries = metadata.state_dict_metadata
        tensors = {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
        self.objects = sorted(entries.keys() - tensors.keys())  # pickles, never read: `..._extra_state/shard_0_24`
        self.shapes = {key: tuple(entry.size) for key, entry in tensors.items()}
        self.dtypes = {key: entry.properties.dtype for key, entry in tensors.items()}
        self._chunks = {key: entry.chunks for key, entry in tensors.items()}
        self._sizes = {(key, tuple(c.offsets)): tuple(c.sizes) for key, chunks in self._chunks.items() for c in chunks}
        self._stored = {
            (index.fqn, tuple(index.offset)): info
            for index, info in metadata.storage_data.items()
            if index.fqn in tensors
        }
        self._check_files()

    def _read_metadata(self) -> Metadata:
        try:
            return read_metadata(self.folder)
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder / '.metadata'} is damaged: {error}") from None

    def _check_files(self) -> None:
        """ValueError, before anything is read or written, where a file is missing or shorter than .metadata says."""
        ends: dict[str, int] = {}
        for info in self._stored.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in ends.items():
            path = self.folder / name
            if not path.is_file():
                raise ValueError(f"{path} is missing; .metadata lists it")
            if path.stat().st_size < end:
                raise ValueError(f"{path} is cut off: it has {path.stat().st_size} bytes, .metadata lists {end}")

    def read_common(self) -> dict[str, Any]:
        """Return what is not sharded: schedule, hyper-parameters, layout. ValueError where it is damaged."""
        path = self.folder / "common.pt"
        try:
            common: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return common
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} is damaged: {str(error).splitlines()[0]}") from None

    def read_region_into(self, target: torch.Tensor, key: str, offsets: tuple[int, ...]) -> None:
        """Fill `target` (on the CPU) with the box of its shape at `offsets`, from the chunks that it touches.

        ValueError where a part of it is missing.
        """
        missing = target.numel()
        for chunk in self._chunks[key]:
            box = [
                (max(o, c), min(o + n, c + m))
                for o, n, c, m in zip(offsets, target.shape, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(low >= high for low, high in box):
                continue
            info = self._stored[key, tuple(chunk.offsets)]
            array, order = find_item(self.folder / info.relative_path, info.offset, info.length)
            self.check_item(array, order, key, tuple(chunk.offsets), tuple(chunk.sizes))
            part = target[tuple(slice(low - o, high - o) for (low, high), o in zip(box, offsets, strict=True))]
            index = [slice(low - c, high - c) for (low, high), c in zip(box, chunk.offsets, strict=True)]
            array.read_into(part.permute(order), tuple(index[axis] for axis in order))
            missing -= part.numel()
        if missing:
            raise ValueError(f"{self.folder}: {missing} elements of {key} at {list(offsets)} are in none of its files")

    def item_of(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> _StorageInfo | None:
        """Where the box is stored as one item, if it is."""
        return self._stored[key, offsets] if self._sizes.get((key, offsets)) == sizes else None

    @property
    def longest_item(self) -> int:
        """Bytes."""
        return max((info.length for info in self._stored.values()), default=0)

    def check_item(
        self, array: FileArray, order: tuple[int, ...], key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> None:
        """ValueError where an item is not the box that .metadata lists."""
        if array.shape != tuple(sizes[axis] for axis in order) or array.dtype is not self.dtypes[key]:
            raise ValueError(
                f"{array.path}: the piece of {key} at {list(offsets)} is {array.dtype} {list(array.shape)}, "
                "not as .metadata says"
            )


class HashingReader:
    """Reads boxes, and takes on its way the SHA-256 of files that are read from the first byte to the last.

    A rank of the layout that wrote a checkpoint asks for the boxes of its own file in their order: the file is then
    read once, for its values and its digest. All other reads take only the bytes that are asked for.
    """

    def __init__(self, stored: StoredTensors) -> None:
        self._stored = stored
        self._memory = mmap.mmap(-1, max(1, stored.longest_item), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._files: dict[str, _FileInOrder] = {}

    def __enter__(self) -> HashingReader:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def read_into(self, target: torch.Tensor, key: str, offsets: tuple[int, ...]) -> None:
        """Fill `target`, on any device, with the box of its shape at `offsets`. ValueError where the files lack it."""
        sizes = tuple(target.shape)
        info = self._stored.item_of(key, offsets, sizes)
        file = self._file(info.relative_path) if info is not None else None
        if info is None or file is None or info.offset != file.position:
            values = target if target.device.type == "cpu" else torch.empty(sizes, dtype=target.dtype)
            self._stored.read_region_into(values, key, offsets)
            if values is not target:
                target.copy_(values)
            return
        file.read_into(memoryview(self._memory)[: info.length])
        array, order = find_array(Window(self._memory, 0, info.length), file.path, info.offset)
        self._stored.check_item(array, order, key, offsets, sizes)
        values = torch.frombuffer(self._memory, dtype=array.dtype, count=target.numel(), offset=array.offset)
        target.permute(order).copy_(values.view(array.shape))

    def digests(self) -> dict[str, str]:
        """File name -> SHA-256 in hexadecimal, of the files that were read whole and in order."""
        return {name: file.digest.hexdigest() for name, file in self._files.items() if file.position == file.nbytes}

    def _file(self, name: str) -> _FileInOrder:
        if name not in self._files:
            self._files[name] = _FileInOrder(self._stored.folder / name)
        return self._files[name]


class _FileInOrder:
    """A file that is read from start to end, and the SHA-256 of what was read."""

    def __init__(self, path: Path) -> None:
        self.path, self.position, self.digest = path, 0, hashlib.sha256()
        self._file = path.open("rb", buffering=0)
        self.nbytes = path.stat().st_size

    def read_into(self, memory: memoryview) -> None:
        """Fill `memory` with the next bytes. ValueError where the file ends too early."""
        left = memory
        with names_file(self.path):
            while left:
                count = self._file.readinto(left)  # at most 2 GB a call
                if not count:
                    raise ValueError(f"{self.path} is cut off: {len(left)} bytes are missing")
                left = left[count:]
        self.digest.update(memory)
        self.position += len(memory)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
