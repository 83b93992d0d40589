"""What a person sees: the progress of a command, and the messages of a training run, of which only rank 0 speaks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import progress as bars
from rich.console import Console as RichConsole

LINE_EVERY_S = 30.0
"""Seconds between two lines of progress where there is no terminal."""


class Progress:
    """How far a piece of work is. This one shows nothing; `show_progress` gives those that do."""

    def expect(self, total: int) -> None:
        """Say how much there is to do, where that is known only after the start."""

    def advance(self, amount: int = 1, name: str = "") -> None:
        """Say that `amount` more is done; `name` says of what."""


SILENT = Progress()


@contextmanager
def show_progress(
    description: str,
    total: int | None = None,
    *,
    done: int = 0,
    in_bytes: bool = False,
    console: RichConsole | None = None,
) -> Iterator[Progress]:
    """Show progress while the block runs: a bar on a terminal, a line every `LINE_EVERY_S` elsewhere.

    total: None where it is not known, or not yet. done: what an earlier run did; the estimates leave it out. in_bytes:
    amounts are bytes, else things that are counted. console: standard error by default.
    """
    console = console or RichConsole(stderr=True, soft_wrap=True, highlight=False)
    if not console.is_terminal:
        yield _Lines(console, description, total, done, in_bytes)
        return
    with bars.Progress(*_columns(in_bytes), console=console, transient=True) as bar:
        yield _Bar(bar, bar.add_task(description, total=total, completed=done, name=""))


def _columns(in_bytes: bool = False) -> list[bars.ProgressColumn]:
    """The parts of a bar; its task needs a field `name`."""
    amount = [bars.DownloadColumn(), bars.TransferSpeedColumn()] if in_bytes else [bars.MofNCompleteColumn()]
    return [
        bars.TextColumn("{task.description:<28}"),
        bars.BarColumn(),
        *amount,
        bars.TimeElapsedColumn(),
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[name]}"),
    ]


class _Bar(Progress):
    """Progress as a bar."""

    def __init__(self, bar: bars.Progress, task: bars.TaskID) -> None:
        self._bar, self._task = bar, task

    def expect(self, total: int) -> None:
        self._bar.update(self._task, total=total)

    def advance(self, amount: int = 1, name: str = "") -> None:
        self._bar.update(self._task, advance=amount, name=name)


class _Lines(Progress):
    """Progress as a line now and then, for log files."""

    def __init__(self, console: RichConsole, description: str, total: int | None, done: int, in_bytes: bool) -> None:
        self._console, self._description, self._in_bytes = console, description, in_bytes
        self._total, self._done, self._first = total, done, done
        self._began = self._spoke = time.monotonic()

    def expect(self, total: int) -> None:
        self._total = total

    def advance(self, amount: int = 1, name: str = "") -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._spoke >= LINE_EVERY_S:
            self._spoke = now
            subject = f"{self._description} {name}".rstrip()
            self._console.print(f"{subject}: {self._amount()}{self._estimate(now - self._began)}", markup=False)

    def _amount(self) -> str:
        if self._in_bytes:
            of = "" if self._total is None else f" of {self._total / 1e9:.2f}"
            return f"{self._done / 1e9:.2f}{of} GB"
        return str(self._done) if self._total is None else f"{self._done}/{self._total}"

    def _estimate(self, seconds: float) -> str:
        rate = (self._done - self._first) / seconds if seconds > 0 else 0.0
        if rate == 0:
            return ""
        speed = f", {rate / 1e6:.0f} MB/s" if self._in_bytes else f", {rate:.1f} per second"
        left = "" if self._total is None else f", about {format_seconds((self._total - self._done) / rate)} left"
        return speed + left


def format_seconds(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Console:
    """The messages and bars of a training run; silent on every rank but the first."""

    def __init__(self, rank: int) -> None:
        self._quiet = rank != 0
        self._console = RichConsole(quiet=self._quiet, soft_wrap=True, highlight=False)
        self._progress = bars.Progress(
            *_columns(),
            console=self._console,
            transient=True,
            disable=self._quiet or not self._console.is_terminal,
        )
        self._progress.start()

    def say(self, text: str) -> None:
        """Print one line that stays."""
        self._console.print(text, markup=False)

    @contextmanager
    def bar(self, description: str, total: int) -> Iterator[Callable[..., None]]:
        """Show a bar on a terminal; the yielded function advances it by one, or by its argument."""
        task = self._progress.add_task(description, total=total, name="")
        try:
            yield lambda n=1, **_: self._progress.advance(task, n)
        finally:
            self._progress.remove_task(task)

    def close(self) -> None:
        """Remove the bars."""
        self._progress.stop()


def step_line(step: int, num_steps: int, record: dict[str, Any]) -> str:
    """Return one line about a step, with units; values that `record` lacks, or that are None, are left out."""
    parts = [f"step {step}/{num_steps}"]
    for text, name in (
        ("accuracy {:.1%}", "accuracy/train"),
        ("kept {:.0f}", "groups/kept"),
        ("dropped {:.0f}", "groups/dropped"),
        ("loss {:.4f}", "loss/total"),
        ("grad norm {:.3f}", "grad_norm"),
        ("length {:.1f} tokens", "length/mean"),
        ("gap {:.1e}", "gap/mean"),
        ("{:.0f} tokens/s", "tokens_per_s"),
        ("{:.2f} s", "seconds/total"),
        ("held-out {:.1%}", "eval/accuracy"),
    ):
        if record.get(name) is not None:
            parts.append(text.format(record[name]))
    return " | ".join(parts)
