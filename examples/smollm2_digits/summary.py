"""Prints a run's held-out figures before and after training, of each length of number and pooled.

python examples/smollm2_digits/summary.py RUN_DIR
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_nft.evaluate.intervals import Interval, score_interval
from megatron_nft.evaluate.questions import QuestionResult
from megatron_nft.evaluate.records import read_answers
from megatron_nft.evaluate.statistics import pass_at_k
from megatron_nft.types import Verdict


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Figures of Q questions with N answers each."""

    accuracy: Interval
    pass_at_n: float
    distinct_wrong: float  # different wrong numbers among a question's N answers, mean over questions
    scores: np.ndarray  # float64 [Q], share of right answers


def read_held_out(folder: Path) -> dict[str, HeldOut]:
    """Figures of an evaluation's folder by the name of its files, and of all questions under "pooled"."""
    results = {
        path.stem: [record.result for _, record in read_answers(path)]
        for path in sorted(folder.glob("answers/*.jsonl"))
    }
    results["pooled"] = [q for questions in results.values() for q in questions]
    return {name: _figures(questions) for name, questions in results.items()}


def _figures(questions: list[QuestionResult]) -> HeldOut:
    right = [sum(a.verdict == Verdict.CORRECT for a in q.answers) for q in questions]
    num = [len(q.answers) for q in questions]
    scores = np.array(right) / np.array(num)
    wrong = [len({a.extracted for a in q.answers if a.verdict == Verdict.WRONG}) for q in questions]
    solved = [pass_at_k(n, c, n) for n, c in zip(num, right, strict=True)]
    return HeldOut(score_interval(scores), float(np.mean(solved)), float(np.mean(wrong)), scores)


def main() -> None:
    run_dir = Path(sys.argv[1])
    before, after = read_held_out(run_dir / "before"), read_held_out(run_dir / "after")
    print(
        "held-out questions | accuracy before -> after (95 % interval) | solved at least once | different wrong answers"
    )
    for name, new in after.items():
        old = before[name]
        print(
            f"{name} ({len(new.scores)}) | {old.accuracy.mean:.1%} -> {new.accuracy.mean:.1%} "
            f"({new.accuracy.low:.1%} to {new.accuracy.high:.1%}) | {old.pass_at_n:.1%} -> {new.pass_at_n:.1%} | "
            f"{old.distinct_wrong:.2f} -> {new.distinct_wrong:.2f}"
        )
    was, now = 100 * before["pooled"].accuracy.mean, 100 * after["pooled"].accuracy.mean
    print(f"held-out accuracy (sampled): {was:.1f} % -> {now:.1f} %")


if __name__ == "__main__":
    main()
