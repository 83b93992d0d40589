"""Checkpoints of a run: written whole or not at all, and the newest complete one found again.

    run_dir/checkpoints/step_000020/
        manifest.json        step, cursor, weight version, model, layout, and size + SHA-256 of every file
        megatron/            weights, optimizer, scheduler, RNG (torch_dist, any layout can read it), a file per rank
        surplus/             groups that wait for the next step, one file per replica
        questions/           how questions were answered before (data.choose)
        waiting/             groups and unfinished answers that go on in the next step (rollout.mode), a file per rank

A folder is filled as `step_000020.partial`. When the files of all ranks are on disk, so is the manifest, and the folder
is renamed; only then are older ones removed. With a group for it, all of this happens in a thread beside the training,
from copies: the step waits for the copies alone, and for the save before if that is still under way.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_nft.data.choice import Past
from megatron_nft.data.sample_file import read_samples, write_samples
from megatron_nft.distributed import gather_objects, largest, run_everywhere
from megatron_nft.files import publish_folder, sha256_of_file, write_atomically
from megatron_nft.train.background import Background
from megatron_nft.train.choosing import Rate, write_past
from megatron_nft.train.manifest import FORMAT, Manifest, complete_steps, folder_of, size_and_digest, what_is_missing
from megatron_nft.train.waiting_file import write_waiting
from megatron_nft.types import TrainingSample

if TYPE_CHECKING:
    from megatron_nft.policy.checkpoint import Snapshot, WrittenPart
    from megatron_nft.train.buffer import OpenGroup

CLOSE_TIMEOUT_S = 60.0
"""How long a run that ends with an error waits for the other ranks' part of a save: they may be gone."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says which, why, and what is intact."""


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run stands after a complete step. The weights and optimizer state belong to it, but live in Policy."""

    step: int = 0
    weight_version: int = 0
    cursor: int = 0  # next draw of the prompt stream
    surplus: tuple[TrainingSample, ...] = field(default=(), repr=False)  # held by this rank's replica
    past: Mapping[int, Past] = field(default_factory=dict, repr=False)  # of questions by Prompt.index, for data.choose
    ahead: tuple[Rate, ...] = field(default=(), repr=False)  # of dropped groups that `past` does not count yet
    waiting: tuple[OpenGroup, ...] = field(default=(), repr=False)  # owned by this rank
    steps_over_gap: int = 0  # steps in a row, up to this one, whose mean gap was above algorithm.gap_limit
    evaluation_due: bool = False  # an evaluation could not be ended under its weights, and is due after this step
    unwritten: dict[str, Any] | None = field(default=None, repr=False)  # Manifest.figures


class CheckpointStore:
    """Saves and loads the checkpoints of one run folder. All methods but `close` are collective over `group`."""

    def __init__(
        self,
        run_dir: Path,
        keep: int,
        identity: dict[str, Any],
        group: dist.ProcessGroup,
        background: dist.ProcessGroup | None = None,
    ) -> None:
        """`identity`: the manifest's seed, model, data and layout. `group`: gloo ranks of the whole world.

        background: another such group, which nothing else uses, to save beside the training; None saves at once.
        """
        self._run_dir, self._keep, self._identity, self._group = run_dir, keep, identity, group
        self._rank, self._world = dist.get_rank(group), dist.get_world_size(group)
        self._background = background
        self._writer = Background("checkpoint-writer")
        self._own_is_written = threading.Event()
        self.saved_step = 0  # of the newest checkpoint that was found or written; 0 without one
        self.pending_step = 0  # of the one that is being written beside the training; 0 without one

    def is_due(self, step: int, every: int) -> bool:
        """Whether a checkpoint is to be saved after `step`: that of a multiple of `every` that has none yet."""
        return step // every > max(self.saved_step, self.pending_step) // every

    def save(self, state: RunState, take: Callable[[], Snapshot], surplus: Sequence[TrainingSample] | None) -> Path:
        """Write `state` and the snapshot that `take` returns; `surplus` is None except on replica leaders.

        With a background group the folder that is returned is whole after `wait`. An earlier save that is still under
        way is waited for. Raises CheckpointError, on every rank, with the earlier checkpoints untouched.
        """
        self.wait()
        snapshot = run_everywhere(take, self._group, CheckpointError, self._what(state))
        self._own_is_written.clear()
        if self._background is None:
            self._write(state, snapshot, surplus, self._group)
        else:
            self.pending_step, group = state.step, self._background
            self._writer.start(lambda: self._write(state, snapshot, surplus, group))
        return folder_of(self._run_dir, state.step)

    def wait(self) -> None:
        """Return when no save is under way. CheckpointError, on every rank, where it failed."""
        if not self.pending_step:
            return
        error, self.pending_step = self._writer.wait(), 0
        if largest(int(error is not None), self._group):
            raise error or CheckpointError("a checkpoint could not be written; another rank says why")

    def check(self) -> None:
        """`wait`, if the save that is under way has ended on every rank."""
        if self.pending_step and not largest(int(self._writer.running), self._group):
            self.wait()

    def newest(self) -> int:
        """The step of the newest checkpoint once no save is under way, 0 without one. For what ends the run: the error
        of a save that failed is not raised in its place."""
        with contextlib.suppress(CheckpointError):
            self.wait()
        return self.saved_step

    def close(self) -> None:
        """On this rank, where the run ends early: let the save that is under way become whole, if the others live."""
        if self.pending_step:
            self._own_is_written.wait(CLOSE_TIMEOUT_S)
            if error := self._writer.wait(CLOSE_TIMEOUT_S):
                raise error

    def _what(self, state: RunState) -> str:
        intact = complete_steps(self._run_dir)
        kept = f"newest intact checkpoint: step {intact[0]}" if intact else "there is no earlier checkpoint"
        return f"checkpoint of step {state.step} could not be written ({kept})"

    def _write(
        self,
        state: RunState,
        snapshot: Snapshot,
        surplus: Sequence[TrainingSample] | None,
        group: dist.ProcessGroup,
    ) -> None:
        final = folder_of(self._run_dir, state.step)
        partial, what = final.with_suffix(".partial"), self._what(state)
        try:
            run_everywhere(lambda: self._make(partial), group, CheckpointError, what)
            own = run_everywhere(
                lambda: self._write_own(partial, snapshot, surplus, state.waiting), group, CheckpointError, what
            )
            parts = gather_objects(own, group)
            run_everywhere(lambda: self._finish(partial, final, state, snapshot, parts), group, CheckpointError, what)
        except CheckpointError:
            if self._rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            self._own_is_written.set()
        self.saved_step = state.step
        run_everywhere(self._remove_old, group, CheckpointError, "older checkpoints could not be removed")

    def _make(self, partial: Path) -> None:
        if self._rank == 0:
            for left_over in partial.parent.glob("*.partial"):
                shutil.rmtree(left_over)
            for folder in ("megatron", "surplus"):
                (partial / folder).mkdir(parents=True)

    def _write_own(
        self,
        partial: Path,
        snapshot: Snapshot,
        surplus: Sequence[TrainingSample] | None,
        waiting: Sequence[OpenGroup],
    ) -> tuple[WrittenPart, dict[str, dict[str, Any]]]:
        """Write this rank's files, each on disk for good. Returns what the first rank needs of them: Megatron's part,
        and size and SHA-256 by path."""
        try:
            part = snapshot.write(partial / "megatron")
            files = {f"megatron/{part.file.name}": {"bytes": part.file.nbytes, "sha256": part.file.sha256}}
            if surplus is not None:
                path = partial / "surplus" / f"rank_{self._rank:05d}.parquet"
                write_samples(path, surplus)
                files[str(path.relative_to(partial))] = size_and_digest(path)
            if waiting:
                path = partial / "waiting" / f"rank_{self._rank:05d}.parquet"
                path.parent.mkdir(exist_ok=True)
                write_waiting(path, waiting)
                files[str(path.relative_to(partial))] = size_and_digest(path)
            return part, files
        finally:
            self._own_is_written.set()

    def _finish(
        self,
        partial: Path,
        final: Path,
        state: RunState,
        snapshot: Snapshot,
        parts: Sequence[tuple[WrittenPart, dict[str, dict[str, Any]]]],
    ) -> None:
        """On the first rank: what describes the files of all ranks, the manifest last, and the folder's name."""
        if self._rank != 0:
            return
        snapshot.finish(partial / "megatron", [part for part, _ in parts])
        write_past(partial, state.past, state.ahead)
        files = {name: facts for _, own in parts for name, facts in own.items()}
        for path in (path for path in partial.rglob("*") if path.is_file()):
            if (name := str(path.relative_to(partial))) not in files:
                files[name] = size_and_digest(path)
        manifest = Manifest(
            format=FORMAT,
            step=state.step,
            weight_version=state.weight_version,
            cursor=state.cursor,
            steps_over_gap=state.steps_over_gap,
            evaluation_due=state.evaluation_due,
            figures=state.unwritten,
            files=dict(sorted(files.items())),
            **self._identity,
        )
        write_atomically(partial / "manifest.json", json.dumps(asdict(manifest), indent=1))
        publish_folder(partial, final)

    def _remove_old(self) -> None:
        if self._rank != 0:
            return
        for step in complete_steps(self._run_dir)[self._keep :]:
            folder = folder_of(self._run_dir, step)
            # Renamed first: a half-removed folder must not look like a checkpoint.
            doomed = folder.with_suffix(".removed.partial")
            os.rename(folder, doomed)
            shutil.rmtree(doomed)

    def steps(self) -> list[int]:
        """Steps that have a finished folder, newest first, as the first rank sees them."""
        return gather_objects(complete_steps(self._run_dir), self._group)[0]

    def restore(
        self, load: Callable[[Path, Manifest], Mapping[str, str]], say: Callable[[str], None]
    ) -> tuple[Path, Manifest] | None:
        """Load the newest checkpoint whose files are all there and unharmed; broken ones are named and passed over.

        `load` is collective, raises ValueError on every rank where it cannot, and returns the SHA-256, by path, of
        files that this rank has read whole. The others are read once more, each by one rank. What a broken
        checkpoint's `load` left is overwritten by that of the next.

        CheckpointError if one is whole but belongs to another model, seed or data, or if there are only broken ones.
        ValueError of `load` if nothing is wrong with the files.
        """
        steps = self.steps()
        for step in steps:
            folder = folder_of(self._run_dir, step)
            problem = self._first(what_is_missing(folder))
            if problem is None:
                manifest = Manifest.read(folder)
                self._check_identity(folder, manifest)
                problem = self._load(folder, manifest, load)
            if problem is None:
                self.saved_step = step
                return folder, manifest
            say(f"checkpoint {folder} is damaged ({problem}); trying the one before it")
        if steps:
            raise CheckpointError(
                f"none of the checkpoints of steps {steps} under {self._run_dir / 'checkpoints'} is whole. "
                "Restore one, or remove the folder to start anew"
            )
        return None

    def _load(
        self, folder: Path, manifest: Manifest, load: Callable[[Path, Manifest], Mapping[str, str]]
    ) -> str | None:
        """Load and check the content of every file; returns what is wrong with one."""
        digests: Mapping[str, str] = {}
        error: ValueError | None = None
        try:
            digests = load(folder, manifest)
        except ValueError as caught:
            error = caught
        known = {name: digest for found in gather_objects(dict(digests), self._group) for name, digest in found.items()}
        problem = self._first(self._changed(folder, manifest, known))
        if error is not None and problem is None:
            raise error
        return problem

    def _first(self, problem: str | None) -> str | None:
        """The first rank's problem of those that any rank has."""
        return next((p for p in gather_objects(problem, self._group) if p), None)

    def _changed(self, folder: Path, manifest: Manifest, known: Mapping[str, str]) -> str | None:
        """A file of another content than when it was written: of those whose digests are `known`, and of this rank's
        share of the others, which it reads."""
        unread = [name for name in manifest.files if name not in known]
        found = {**known, **{name: sha256_of_file(folder / name) for name in unread[self._rank :: self._world]}}
        changed = [name for name, digest in found.items() if digest != manifest.files[name]["sha256"]]
        return f"{changed[0]} has another SHA-256 than when it was written" if changed else None

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
