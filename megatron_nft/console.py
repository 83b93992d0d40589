"""What a person sees: progress bars on a terminal, one line per step everywhere. Only rank 0 speaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Console:
    """Messages and progress; silent on every rank but the first."""

    def __init__(self, rank: int) -> None:
        self._quiet = rank != 0
        self._console = RichConsole(quiet=self._quiet, soft_wrap=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=self._quiet or not self._console.is_terminal,
        )
        self._progress.start()

    def say(self, text: str) -> None:
        """One line that stays."""
        self._console.print(text, markup=False)

    @contextmanager
    def bar(self, description: str, total: int) -> Iterator[Callable[..., None]]:
        """A progress bar; the yielded function advances it (by one, or by its argument)."""
        task = self._progress.add_task(description, total=total)
        try:
            yield lambda n=1, **_: self._progress.advance(task, n)
        finally:
            self._progress.remove_task(task)

    def close(self) -> None:
        self._progress.stop()


def step_line(step: int, num_steps: int, record: dict[str, Any]) -> str:
    """One step in one line, with units."""
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
        if name in record:
            parts.append(text.format(record[name]))
    return " | ".join(parts)
