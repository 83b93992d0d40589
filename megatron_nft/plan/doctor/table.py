"""The doctor's page: one row per node, one line per problem with its mend, and a verdict."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_nft.plan.doctor.checks import SHOWN, Problem
from megatron_nft.plan.doctor.facts import NodeFacts


def as_text(nodes: Sequence[NodeFacts], problems: Sequence[Problem]) -> str:
    """The whole page. Where two versions stand in a cell, the second is the engine's."""
    rows = [list(SHOWN), *([show(node) for show in SHOWN.values()] for node in nodes)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    for node in nodes:
        if node.other_cudnns:
            lines.append(
                f"{node.host}: beside torch's own cuDNN there is {', '.join(node.other_cudnns)}; it is not used"
            )
        lines += [f"{node.host}: {name}: works" for name, problem in node.deep.items() if not problem]
    lines += [f"{'PROBLEM' if p.fatal else 'warning'}  {p.where}: {p.what}; {p.mend}" for p in problems]
    fatal = sum(p.fatal for p in problems)
    verdict = (
        f"the run would fail: {_count(fatal, 'problem')}" if fatal else "nothing that would stop the run was found"
    )
    warnings = len(problems) - fatal
    ending = f", {_count(warnings, 'warning')}" if warnings else ""
    return "\n".join([*lines, f"doctor: {_count(len(nodes), 'node')}; {verdict}{ending}"])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
