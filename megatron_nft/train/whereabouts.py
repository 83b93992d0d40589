"""Where every rank of a run is, in one small file per rank of the shared run folder, and which one the others wait for.

    run_dir/ranks/rank_00003.json

A rank writes its file when it enters a phase and every few seconds after that, from a thread of its own, so that it
does so while it waits in a collective too. Ages are taken between the files' times, which one file server gives, not
between the clocks of hosts.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

LOST = "lost the connection to another rank"
"""How a rank begins to tell why it ended where that was the end of another one."""

SILENT_BEATS = 4  # a rank of which nothing was heard for so many heartbeats is gone, or cannot be reached
EARLIER_RUN_S = 300.0  # a file that is so much older than ours when we begin is of an earlier start
ORDER = (
    *("start", "generate", "exchange", "logprobs", "write", "train", "evaluate_wait", "sync"),
    *("checkpoint_wait", "checkpoint", "evaluate", "export"),
)
"""The phases of a step, in which ranks follow each other. A phase that is not listed comes last."""


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """What one rank tells of itself."""

    rank: int
    host: str
    step: int
    phase: str
    waits: bool = False  # it has done its part of the phase, and waits for the others
    between: bool = False  # the phase has ended, the next one has not begun
    quiet_s: float = 0.0  # since its last sign of progress
    silent_s: float = 0.0  # since it wrote this, when another rank reads it
    ended: str = ""  # why it ended; empty while it runs

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"

    @property
    def place(self) -> tuple[int, int, bool, bool]:
        """How far it is, to compare with others."""
        number = ORDER.index(self.phase) if self.phase in ORDER else len(ORDER)
        return self.step, number, self.between, self.waits


class Board:
    """The files of all ranks, as one of them sees them."""

    def __init__(self, run_dir: Path, rank: int, world_size: int, heartbeat_s: float) -> None:
        """heartbeat_s: how often ranks write."""
        self._silent_s = SILENT_BEATS * heartbeat_s
        self._folder, self._rank, self._world_size = run_dir / "ranks", rank, world_size
        self._began: float | None = None  # time of our first file

    def write(self, own: Whereabouts) -> None:
        """Write this rank's file. A folder that cannot be written must not end a run: nothing is raised."""
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._path(self._rank)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(asdict(own)), encoding="utf-8")
            os.replace(partial, path)  # whole, but not flushed to disk: it is of no use after a crash of the host
            self._began = self._began or path.stat().st_mtime

    def read(self) -> list[Whereabouts | None]:
        """What every rank wrote last, in rank order; None for one that has written nothing since the start."""
        try:
            now = self._path(self._rank).stat().st_mtime
        except OSError:
            return [None] * self._world_size
        return [self._read(rank, now) for rank in range(self._world_size)]

    def who_is_missing(self) -> str:
        """Say in words which ranks the others wait for, as far as the files tell."""
        return who_is_missing(self.read(), self._silent_s)

    def _read(self, rank: int, now: float) -> Whereabouts | None:
        try:
            with open(self._path(rank), encoding="utf-8") as file:
                written = os.fstat(file.fileno()).st_mtime
                found = Whereabouts(**json.load(file))
        except (OSError, ValueError, TypeError):
            return None
        if self._began is not None and written < self._began - EARLIER_RUN_S:
            return None
        silent_s = max(0.0, now - written)
        return replace(found, silent_s=silent_s, quiet_s=found.quiet_s + silent_s)

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank_{rank:05d}.json"


def who_is_missing(ranks: Sequence[Whereabouts | None], silent_s: float) -> str:
    """`Board.who_is_missing` for what was read; a rank that is silent for longer than `silent_s` is gone."""
    if gone := _gone(ranks, silent_s):
        return gone
    seen = [r for r in ranks if r is not None]
    behind, front = min(r.place for r in seen), max(r.place for r in seen)
    missing = [r for r in seen if r.place == behind]
    if behind == front:
        slowest = max(seen, key=lambda r: r.quiet_s)
        return f"all {len(seen)} ranks are in phase {slowest.phase}, the longest without progress {_where(slowest)}"
    waiting = [r for r in seen if r.place == front]
    ahead = waiting[0]
    entered = "finished" if behind[:2] == front[:2] else "entered"
    what = "; ".join(f"{r} has not {entered} phase {ahead.phase}: {_state(r)}" for r in missing[:4])
    what += f"; nor have {len(missing) - 4} more" if len(missing) > 4 else ""
    longest_s = max(r.quiet_s for r in waiting)
    return f"{what}. {_count(len(waiting))} for {longest_s:.0f} s in it"


def silence_of(ranks: Sequence[Whereabouts]) -> str:
    """Say in words that nothing is heard of these ranks any more, and where they were, or why they ended."""
    return _first_few(
        [
            _end(r)
            if r.ended and not r.ended.startswith(LOST)
            else f"{r} has not been heard from for {r.silent_s:.0f} s; it was in phase {r.phase}, step {r.step}"
            for r in ranks
        ]
    )


def _gone(ranks: Sequence[Whereabouts | None], silent_s: float) -> str:
    """Ranks that have ended, that never began, or that are silent."""
    ended = [r for r in ranks if r is not None and r.ended and not r.ended.startswith(LOST)]
    if ended:
        return _first_few([_end(r) for r in ended])
    unseen = [f"rank {number} has not started" for number, r in enumerate(ranks) if r is None]
    silent = [r for r in ranks if r is not None and r.silent_s > silent_s and not r.ended]
    return "; ".join(filter(None, (_first_few(unseen), silence_of(silent))))


def _end(r: Whereabouts) -> str:
    return f"{r} ended in phase {r.phase}: {r.ended}"


def _first_few(said: Sequence[str]) -> str:
    more = f"; and {len(said) - 4} more" if len(said) > 4 else ""
    return "; ".join(said[:4]) + more


def _state(r: Whereabouts) -> str:
    after = "after" if r.between else "in"
    return f"it is {after} phase {r.phase} of step {r.step}, without progress for {r.quiet_s:.0f} s"


def _where(r: Whereabouts) -> str:
    return f"{r} ({r.quiet_s:.0f} s)"


def _count(number: int) -> str:
    return "The other one has waited" if number == 1 else f"The {number} others have waited"
