"""Reads `.metadata`, torch's index of a sharded checkpoint, without trusting it.

torch reads the file with plain pickle. The unpickler here knows only torch's own checkpoint records
(`ALLOWED_IN_METADATA`), so nothing else in the file can run.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

ALLOWED_IN_METADATA = {
    "torch": {"Size", "float32", "bfloat16", "float16", "uint8", "int64"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath"},
}
"""Module -> the names in it that `.metadata` may refer to."""


def read_metadata(folder: Path) -> Metadata:
    """What `.metadata` says; ValueError when it names anything but torch's checkpoint records."""
    path = folder / ".metadata"
    with path.open("rb") as file:
        metadata: Metadata = _MetadataUnpickler(file, path).load()
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED_IN_METADATA.get(module, ()):
            raise ValueError(
                f"{self.path} wants to load {module}.{name}; allowed: torch's checkpoint records only. "
                "The file was not written by this program, or was tampered with"
            )
        return super().find_class(module, name)
