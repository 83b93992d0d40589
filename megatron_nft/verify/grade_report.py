"""The tables that `megatron-nft grade` prints: verdicts, reasons, and the rows on which several graders differ."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_nft.types import Verdict
from megatron_nft.verify.outcome import graders_disagree

VERDICTS = tuple(Verdict)
SHOWN_DISAGREEMENTS = 20
SHOWN_REASONS = 8


@dataclass(slots=True)
class Tally:
    """Counts over all rows of a file."""

    graders: tuple[str, ...]
    verdicts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    pairs: dict[str, Counter[tuple[str, str]]] = field(default_factory=dict)  # other grader -> (first's, its) verdicts
    disagreements: int = 0
    shown: list[tuple[int, dict[str, str], Any, Any]] = field(
        default_factory=list
    )  # (row, verdicts, extracted, answer)
    seconds: float = 0.0  # of grading, all workers together

    def add(self, number: int, result: dict[str, Any], answer: Any) -> None:
        """Count the row with this number (from 1). result: as in the journal; answer: the reference."""
        self.verdicts[result["verdict"]] += 1
        self.seconds += result["seconds"]
        if result["reason"]:
            self.reasons[result["reason"][:100]] += 1
        by_grader = result["grader_verdicts"]
        first = by_grader[self.graders[0]]
        for name in self.graders[1:]:
            self.pairs.setdefault(name, Counter())[first, by_grader[name]] += 1
        if disagree(by_grader):
            self.disagreements += 1
            if len(self.shown) < SHOWN_DISAGREEMENTS:
                self.shown.append((number, by_grader, result["extracted"], answer))


def disagree(by_grader: dict[str, str]) -> bool:
    """Whether one grader says correct and another does not. by_grader: the first grader first."""
    return graders_disagree([Verdict(verdict) for verdict in by_grader.values()])


def print_report(console: Console, tally: Tally) -> None:
    """Print the tables, the most interesting one first."""
    rows = sum(tally.verdicts.values())
    table = Table(title=f"verdicts by {tally.graders[0]}")
    for column in ("verdict", "rows", "share"):
        table.add_column(column, justify="left" if column == "verdict" else "right")
    for verdict in VERDICTS:
        count = tally.verdicts[verdict]
        table.add_row(verdict, str(count), f"{count / rows:.1%}" if rows else "-")
    table.add_row("all", str(rows), f"{tally.seconds:.1f} s of grading", style="bold")
    console.print(table)
    if tally.reasons:
        reasons = Table(title="why not graded, most frequent first")
        reasons.add_column("reason")
        reasons.add_column("rows", justify="right")
        for reason, count in tally.reasons.most_common(SHOWN_REASONS):
            reasons.add_row(_plain(reason), str(count))
        console.print(reasons)
    for name, counts in tally.pairs.items():
        console.print(_confusion(tally.graders[0], name, counts))
    if tally.pairs:
        console.print(
            f"{tally.disagreements} of {rows} rows are correct for one grader and not for another", markup=False
        )
    if tally.shown:
        console.print(_disagreements(tally))


def _confusion(first: str, other: str, counts: Counter[tuple[str, str]]) -> Table:
    table = Table(title=f"rows: {first} (down), {other} (across)")
    table.add_column(first)
    for verdict in VERDICTS:
        table.add_column(verdict, justify="right")
    for down in VERDICTS:
        table.add_row(down, *(str(counts[down, across]) for across in VERDICTS))
    return table


def _disagreements(tally: Tally) -> Table:
    more = tally.disagreements - len(tally.shown)
    table = Table(title=f"rows on which they disagree{f' (the first {len(tally.shown)})' if more else ''}")
    table.add_column("row", justify="right")
    for name in tally.graders:
        table.add_column(name)
    table.add_column("extracted")
    table.add_column("answer")
    for number, by_grader, extracted, answer in tally.shown:
        verdicts = [by_grader[name] for name in tally.graders]
        table.add_row(str(number), *verdicts, _plain(extracted), _plain(answer))
    return table


def _plain(value: Any, limit: int = 60) -> Any:
    """Return a value as a short text that rich does not interpret."""
    from rich.text import Text

    text = "".join(c if c.isprintable() else "\N{MIDDLE DOT}" for c in str("" if value is None else value))
    return Text(text if len(text) <= limit else text[: limit - 3] + "...")
