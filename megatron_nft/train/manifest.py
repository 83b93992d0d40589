"""The folders of a run's checkpoints, and what manifest.json says of one."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_nft.files import flush_to_disk, sha256_of_file

FORMAT = 1
_NAME = re.compile(r"step_(\d+)$")


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of manifest.json, whose keys are the fields' names."""

    format: int
    step: int
    weight_version: int
    cursor: int
    seed: int
    model: dict[str, Any]  # the architecture (ModelSpec)
    data: str  # digest of the training questions
    layout: dict[str, int]
    files: dict[str, dict[str, Any]]  # relative path -> {bytes, sha256}
    steps_over_gap: int = 0  # of RunState
    evaluation_due: bool = False  # of RunState
    figures: dict[str, Any] | None = None  # Metrics.state of the step, of all ranks, where its record was not written

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a checkpoint folder. OSError, ValueError or TypeError if it cannot be read."""
        values = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        values.pop("optimizer_steps", None)  # written by versions up to 0.1.0 and read by none
        return cls(**values)


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:06d}"


def complete_steps(run_dir: Path) -> list[int]:
    """Steps that have a finished folder, newest first."""
    root = run_dir / "checkpoints"
    names = [m for p in (root.iterdir() if root.is_dir() else ()) if (m := _NAME.match(p.name))]
    return sorted((int(m[1]) for m in names), reverse=True)


def what_is_missing(folder: Path) -> str | None:
    """What is wrong with a checkpoint's manifest, or with the names and sizes of its files; None if nothing is."""
    try:
        manifest = Manifest.read(folder)
    except (OSError, ValueError, TypeError) as e:
        return f"manifest.json: {e}"
    if manifest.format != FORMAT:
        return f"manifest.json has format {manifest.format}, this version reads {FORMAT}"
    for name, facts in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {facts['bytes']}"
    return None


def size_and_digest(path: Path) -> dict[str, Any]:
    """What a manifest says of a (small) file, which is then on disk for good."""
    flush_to_disk(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
