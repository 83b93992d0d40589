"""What comparisons of algorithms over seeds have in common: rows that may be pooled, and paired differences.

An arm is one algorithm with its settings. All arms of a seed start from the same model and draw the same questions, so
that arms are compared by their differences within seeds. A row says what it was measured with: the commit, the machine
and a digest of the code that trains. Rows of different digests are never pooled.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import comb, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from megatron_nft.evaluate.intervals import PairedDifference, paired_difference, t_quantile

ROOT = Path(__file__).resolve().parents[1]
MARGIN = 0.025  # differences within 2.5 points are called equivalent
_APART = ("evaluate", "plan", "report", "cli.py")  # of megatron_nft: what they do changes no training

GRID: dict[str, tuple[str, tuple[str, ...]]] = {  # arm -> (file of configs/, settings)
    "NFT(1 - r)": ("quickstart", ()),
    "NFT(1)": ("quickstart", ("algorithm.prompt_weight=uniform",)),
    "NFT(sqrt)": ("quickstart", ("algorithm.prompt_weight=grpo",)),
    "RFT": ("quickstart_rft", ()),
    "RFT(1 - r)": ("quickstart_rft", ("algorithm.prompt_weight=dr_grpo",)),
    "Dr. GRPO": ("quickstart_dr_grpo", ()),
    "GRPO": ("quickstart_grpo", ()),
    "DAPO": ("quickstart_dapo", ()),
}
"""The losses that are compared on the quick start's task."""


@dataclass(frozen=True, slots=True)
class Difference:
    """An arm beside another over n seeds."""

    paired: PairedDifference  # this arm - the other
    wins: int
    losses: int
    sign_p: float  # two-sided sign test: how often equal arms win or lose as one-sidedly
    seeds_needed: int  # for an interval of half-width MARGIN, from the spread that was seen

    @property
    def is_equivalent(self) -> bool:
        """Whether the whole interval lies within +- MARGIN."""
        interval = self.paired.difference
        return interval.low >= -MARGIN and interval.high <= MARGIN


def compare_arms(arm: Sequence[float], other: Sequence[float]) -> Difference:
    """Compare two arms by their figures of each seed, in the same order, each in [0, 1]."""
    a, b = np.asarray(arm, dtype=np.float64), np.asarray(other, dtype=np.float64)
    wins, losses = int((a > b).sum()), int((a < b).sum())
    return Difference(paired_difference(b, a), wins, losses, sign_test(wins, losses), seeds_for_margin(a - b))


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p-value of the exact sign test; ties are left out."""
    n, fewer = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(comb(n, k) for k in range(fewer + 1)) / 2**n)


def seeds_for_margin(differences: np.ndarray) -> int:
    """Return how many seeds an interval of half-width MARGIN needs at the spread of `differences` [n]; 0 for n < 2."""
    if len(differences) < 2:
        return 0
    spread, n = float(np.std(differences, ddof=1)), 2
    while t_quantile(n - 1) * spread / sqrt(n) > MARGIN:
        n += 1 + n // 50
    return n


@cache
def code_digest(configs: tuple[str, ...]) -> str:
    """Return the first 12 digits of the SHA-256 of the code that trains and of the named files of configs/."""
    package = ROOT / "megatron_nft"
    files = [p for p in package.rglob("*.py") if p.relative_to(package).parts[0] not in _APART]
    files += [ROOT / "configs" / f"{name}.yaml" for name in configs]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(ROOT)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


@cache
def origin(configs: tuple[str, ...]) -> dict[str, str]:
    """Return what a row was measured with: commit, digest, machine and versions."""
    import torch

    command = ["git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return {
        "commit": commit,
        "digest": code_digest(configs),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_model(),
        "torch": torch.__version__,
    }


def cpu_model() -> str:
    """Return the name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def read_seeds(path: Path, digest: str) -> dict[int, dict[str, dict[str, Any]]]:
    """Return seed -> arm -> row of the finished seeds of one digest."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for row in map(json.loads, lines):
        if row["digest"] == digest:
            found.setdefault(row["seed"], {})[row["arm"]] = row
    return found


def add_seed(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append the rows of all arms of a seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def describe(name: str, difference: Difference) -> str:
    """Return a difference as a row of a table: points with interval, wins and losses, what is decided."""
    d = difference.paired.difference
    verdict = "equivalent" if difference.is_equivalent else "different" if d.low > 0 or d.high < 0 else "not decided"
    return (
        f"| {name} | {100 * d.mean:+.1f} ({100 * d.low:+.1f} to {100 * d.high:+.1f}) | "
        f"{difference.wins} : {difference.losses} (p {difference.sign_p:.2f}) | {verdict} | "
        f"{difference.seeds_needed or 'two at least'} |"
    )


TABLE_HEAD = (
    "| | difference in points (95 %) | seeds won : lost (sign test) | within ± 2.5 points? | seeds for ± 2.5 |\n"
    "|---|---|---|---|---|"
)
