"""Progress of an evaluation: a bar with an estimate on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 30.0


class Counter:
    """Counts to `total` from `done`, and estimates from what was done since."""

    def __init__(self, description: str, total: int, done: int, bar: Progress | None) -> None:
        self._description, self._total, self._done, self._start = description, total, done, done
        self._began = self._spoke = time.monotonic()
        self._bar = bar
        if bar is not None:
            self._task = bar.add_task(description, total=total, completed=done)

    def advance(self, n: int = 1) -> None:
        self._done += n
        if self._bar is not None:
            self._bar.advance(self._task, n)
        elif time.monotonic() - self._spoke >= LINE_EVERY_S:
            self._spoke = time.monotonic()
            print(f"{self._description}: {self._done}/{self._total}{self._estimate()}", file=sys.stderr, flush=True)

    def _estimate(self) -> str:
        seconds = time.monotonic() - self._began
        rate = (self._done - self._start) / seconds if seconds > 0 else 0.0
        if rate == 0:
            return ""
        return f", {rate:.1f} per second, about {format_seconds((self._total - self._done) / rate)} left"


def format_seconds(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Counter]:
    """Shows a counter while the block runs."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Counter(description, total, done, None)
        return
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        yield Counter(description, total, done, bar)
