"""The model under evaluation: whether its folder is complete, and a checksum that says which model it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

from megatron_nft.files import sha256_of_file
from megatron_nft.weights.hf_folder import INDEX_NAME, HFFolder

IDENTITY_FILES = (
    "config.json",
    "generation_config.json",
    INDEX_NAME,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "chat_template.jinja",
)
"""Files beside the weights that change what the model answers."""


class ModelFolderError(ValueError):
    """A model folder that cannot be evaluated. The message says what is missing."""


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What an evaluation writes about its model."""

    path: str
    checksum: str  # SHA-256 over the names and SHA-256 of weights, config and tokenizer files
    num_parameters: int
    max_positions: int  # longest prompt plus answer


def inspect_model(path: Path) -> tuple[int, int]:
    """Return (number of parameters, longest sequence) from the headers. ModelFolderError where files are missing."""
    path = Path(path)
    if not path.is_dir():
        raise ModelFolderError(f"model folder {path} does not exist; --model takes a folder in Hugging Face format")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFolderError(f"model folder {path} has no config.json") from None
    except (OSError, ValueError) as e:
        raise ModelFolderError(f"{path / 'config.json'} cannot be read: {e}") from None
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int) or positions < 2:
        raise ModelFolderError(f"{path / 'config.json'}: max_position_embeddings is {positions!r}, not a length")
    try:
        shapes = HFFolder(path).shapes
    except ValueError as e:
        raise ModelFolderError(str(e)) from None
    return sum(prod(shape) for shape in shapes.values()), positions


def identify_model(path: Path, *, on_bytes: Callable[[int], None] | None = None) -> ModelIdentity:
    """Read every byte of the weights once and return what the model is; `on_bytes` is told how many more were read.

    ModelFolderError where the folder is incomplete.
    """
    path = Path(path)
    num_parameters, positions = inspect_model(path)
    files = [path / name for name in IDENTITY_FILES if (path / name).is_file()] + sorted(path.glob("*.safetensors"))
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing leaves the interpreter's lock
        sums = list(pool.map(lambda file: sha256_of_file(file, on_bytes), files))
    lines = "".join(f"{checksum}  {file.name}\n" for checksum, file in zip(sums, files))
    return ModelIdentity(str(path), hashlib.sha256(lines.encode()).hexdigest(), num_parameters, positions)


def weight_bytes(path: Path) -> int:
    """Return the bytes of the weight files, for a progress bar."""
    return sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
