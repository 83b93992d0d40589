"""Checkpoints of a run: written whole or not at all, and the newest complete one found again.

    run_dir/checkpoints/step_000020/
        manifest.json        step, cursor, weight version, model, layout, and size + SHA-256 of every file
        megatron/            weights, optimizer, scheduler, RNG (torch_dist, any layout can read it)
        surplus/             groups that wait for the next step, one file per replica

A folder is filled as `step_000020.partial` and renamed when its manifest is on disk; only then are older ones removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_nft.data.sample_file import read_samples, write_samples
from megatron_nft.distributed import gather_objects, run_everywhere
from megatron_nft.files import flush_to_disk, publish_folder, sha256_of_file, write_atomically
from megatron_nft.types import TrainingSample

FORMAT = 1
_NAME = re.compile(r"step_(\d+)$")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says which, why, and what is intact."""


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run stands after a complete step. The weights and optimizer state belong to it, but live in Policy."""

    step: int = 0
    weight_version: int = 0
    cursor: int = 0  # next draw of the prompt stream
    surplus: tuple[TrainingSample, ...] = field(default=(), repr=False)  # held by this rank's replica
    steps_over_gap: int = 0  # steps in a row, up to this one, whose mean gap was above algorithm.gap_limit
    unwritten: dict[str, Any] | None = field(default=None, repr=False)  # Manifest.figures


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
    steps_over_gap: int = 0
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


class CheckpointStore:
    """Saves and loads the checkpoints of one run folder. All methods are collective over `group`."""

    def __init__(self, run_dir: Path, keep: int, identity: dict[str, Any], group: dist.ProcessGroup) -> None:
        """`identity`: the manifest's seed, model, data and layout. `group`: gloo ranks of the whole world."""
        self._run_dir, self._keep, self._identity, self._group = run_dir, keep, identity, group
        self._rank, self._world = dist.get_rank(group), dist.get_world_size(group)
        self.saved_step = 0  # of the newest checkpoint that was found or written; 0 without one

    def save(
        self, state: RunState, save_megatron: Callable[[Path], None], surplus: Sequence[TrainingSample] | None
    ) -> Path:
        """Write `state`. `save_megatron(folder)` is collective; `surplus` is None except on replica leaders.

        Raises CheckpointError, on every rank, with the earlier checkpoints untouched.
        """
        final = folder_of(self._run_dir, state.step)
        partial = final.with_suffix(".partial")
        intact = complete_steps(self._run_dir)
        kept = f"newest intact checkpoint: step {intact[0]}" if intact else "there is no earlier checkpoint"
        what = f"checkpoint of step {state.step} could not be written ({kept})"
        try:
            run_everywhere(lambda: self._make(partial), self._group, CheckpointError, what)
            run_everywhere(lambda: save_megatron(partial / "megatron"), self._group, CheckpointError, what)
            run_everywhere(lambda: self._write_surplus(partial, surplus), self._group, CheckpointError, what)
            hashes = run_everywhere(lambda: self._hash(partial), self._group, CheckpointError, what)
            files = dict(item for part in gather_objects(hashes, self._group) for item in part.items())
            run_everywhere(lambda: self._finish(partial, final, state, files), self._group, CheckpointError, what)
        except CheckpointError:
            if self._rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        self.saved_step = state.step
        if self._rank == 0:
            self._remove_old()
        return final

    def _make(self, partial: Path) -> None:
        if self._rank == 0:
            for left_over in partial.parent.glob("*.partial"):
                shutil.rmtree(left_over)
            for folder in ("megatron", "surplus"):
                (partial / folder).mkdir(parents=True)

    def _write_surplus(self, partial: Path, surplus: Sequence[TrainingSample] | None) -> None:
        if surplus is not None:
            write_samples(partial / "surplus" / f"rank_{self._rank:05d}.parquet", surplus)

    def _hash(self, partial: Path) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of this rank's share of the files, each on disk for good."""
        paths = sorted(p for p in partial.rglob("*") if p.is_file())
        out = {}
        for path in paths[self._rank :: self._world]:
            flush_to_disk(path)
            out[str(path.relative_to(partial))] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        return out

    def _finish(self, partial: Path, final: Path, state: RunState, files: dict[str, dict[str, Any]]) -> None:
        if self._rank != 0:
            return
        manifest = Manifest(
            format=FORMAT,
            step=state.step,
            weight_version=state.weight_version,
            cursor=state.cursor,
            steps_over_gap=state.steps_over_gap,
            figures=state.unwritten,
            files=dict(sorted(files.items())),
            **self._identity,
        )
        write_atomically(partial / "manifest.json", json.dumps(asdict(manifest), indent=1))
        publish_folder(partial, final)

    def _remove_old(self) -> None:
        for step in complete_steps(self._run_dir)[self._keep :]:
            folder = folder_of(self._run_dir, step)
            # Renamed first: a half-removed folder must not look like a checkpoint.
            doomed = folder.with_suffix(".removed.partial")
            os.rename(folder, doomed)
            shutil.rmtree(doomed)

    def newest(self, say: Callable[[str], None]) -> tuple[Path, Manifest] | None:
        """The newest checkpoint whose files are all there and unharmed; broken ones are named and passed over.

        CheckpointError if one is whole but belongs to another model, seed or data, or if there are only broken ones.
        """
        steps = gather_objects(complete_steps(self._run_dir), self._group)[0]
        for step in steps:
            folder = folder_of(self._run_dir, step)
            found = [p for p in gather_objects(self._problem(folder), self._group) if p]
            if not found:
                manifest = Manifest.read(folder)
                self._check_identity(folder, manifest)
                self.saved_step = step
                return folder, manifest
            say(f"checkpoint {folder} is damaged ({found[0]}); trying the one before it")
        if steps:
            raise CheckpointError(
                f"none of the checkpoints of steps {steps} under {self._run_dir / 'checkpoints'} is whole. "
                "Restore one, or remove the folder to start anew"
            )
        return None

    def _problem(self, folder: Path) -> str | None:
        """What is wrong with this rank's share of the files."""
        try:
            manifest = Manifest.read(folder)
        except (OSError, ValueError, TypeError) as e:
            return f"manifest.json: {e}"
        if manifest.format != FORMAT:
            return f"manifest.json has format {manifest.format}, this version reads {FORMAT}"
        for i, (name, facts) in enumerate(manifest.files.items()):
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {facts['bytes']}"
            if i % self._world == self._rank and sha256_of_file(path) != facts["sha256"]:
                return f"{name} has another SHA-256 than when it was written"
        return None

    def _check_identity(self, folder: Path, manifest: Manifest) -> None:
        for key in ("model", "seed", "data"):
            then, now = getattr(manifest, key), self._identity[key]
            if then == now:
                continue
            if isinstance(then, dict):
                keys = sorted(k for k in {*then, *now} if then.get(k) != now.get(k))
                then, now = ({k: d.get(k) for k in keys} for d in (then, now))
            raise CheckpointError(
                f"{folder} belongs to a run with another {key}: {then} there, {now} here. "
                "Use another run_dir, or the settings that the run was started with"
            )


def read_surplus(folder: Path) -> list[TrainingSample]:
    """All surplus samples of a checkpoint, in a fixed order, whatever layout wrote them."""
    paths = sorted((folder / "surplus").glob("rank_*.parquet"))
    return sorted((s for p in paths for s in read_samples(p)), key=lambda s: (s.draw, s.sample_index))
