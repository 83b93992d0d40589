"""Is B better than A? Two evaluations, paired question by question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_nft.evaluate.evaluation import EvaluationError, answer_path, read_json
from megatron_nft.evaluate.intervals import LEVEL, PairedDifference, average_difference, holm, paired_difference
from megatron_nft.evaluate.protocol import FORMAT, differences
from megatron_nft.evaluate.records import AnswerRecord, read_answers


@dataclass(frozen=True, slots=True)
class Change:
    """A question of which the two models answer different shares correctly."""

    id: str
    prompt: str
    answer: str
    a: float  # share of A's answers that are correct
    b: float  # of B's


@dataclass(frozen=True, slots=True)
class Comparison:
    """One benchmark, A against B."""

    name: str
    questions: int  # that both were asked
    a: float  # mean accuracy of A over these
    b: float
    paired: PairedDifference
    p_corrected: float  # paired.p_value, corrected for the number of benchmarks
    changes: list[Change]  # the largest first


def open_evaluation(folder: Path) -> dict[str, Any]:
    """Read results.json of an evaluation folder. EvaluationError where there is none, or one of another version."""
    folder = Path(folder)
    path = folder / "results.json"
    if not path.exists():
        unfinished = (folder / "protocol.json").exists()
        raise EvaluationError(
            f"{folder} holds no results.json"
            + ("; the evaluation is not finished, run it again to go on" if unfinished else ", so it is no evaluation")
        )
    results = read_json(path)
    if results.get("format") != FORMAT:
        raise EvaluationError(
            f"{path} has format {results.get('format')!r}, this version reads {FORMAT}: evaluate again"
        )
    return results


def compare(
    folder_a: Path, folder_b: Path, *, allow_different: bool = False
) -> tuple[list[Comparison], Any, list[str]]:
    """Return (one comparison per shared benchmark, paired difference of the averages, protocol differences).

    p-values of the benchmarks are corrected for their number; the average, of which there is one, is not among them.

    EvaluationError where the protocols differ and `allow_different` is not set, or no benchmark is shared.
    """
    a, b = open_evaluation(folder_a), open_evaluation(folder_b)
    differ = differences(a["protocol"], b["protocol"])
    if differ and not allow_different:
        raise EvaluationError(
            "A and B were not evaluated in the same way; evaluate one of them again, or compare all the same with "
            "--allow-different:\n  " + "\n  ".join(differ)
        )
    shared = [name for name in a["benchmarks"] if name in b["benchmarks"]]
    if not shared:
        raise EvaluationError(
            f"A ({', '.join(a['benchmarks'])}) and B ({', '.join(b['benchmarks'])}) have no benchmark in common"
        )
    found = [_compare_benchmark(name, Path(folder_a), Path(folder_b)) for name in shared]
    corrected = holm([c.paired.p_value for c in found])
    comparisons = [replace(c, p_corrected=p) for c, p in zip(found, corrected)]
    return comparisons, _average(comparisons), differ


def _compare_benchmark(name: str, folder_a: Path, folder_b: Path) -> Comparison:
    left, right = (_by_question(answer_path(folder, name)) for folder in (folder_a, folder_b))
    keys = [key for key in left if key in right]
    if not keys:
        raise EvaluationError(f"benchmark {name}: A and B answered no question in common")
    scores = np.array([[_score(side[key]) for key in keys] for side in (left, right)])
    changes = [
        Change(left[key].id, left[key].prompt, left[key].answer, float(sa), float(sb))
        for key, sa, sb in zip(keys, *scores)
        if sa != sb
    ]
    changes.sort(key=lambda c: -abs(c.b - c.a))
    a, b = scores.mean(axis=1)
    paired = paired_difference(*scores)
    return Comparison(name, len(keys), float(a), float(b), paired, paired.p_value, changes)


def _by_question(path: Path) -> dict[tuple[str, str], AnswerRecord]:
    """Records by prompt and answer: they identify a question more surely than its place in a file."""
    return {(record.prompt, record.answer): record for _, record in read_answers(path)}


def _score(record: AnswerRecord) -> float:
    return record.result.num_correct / len(record.result.answers)


def _average(comparisons: Sequence[Comparison]) -> dict[str, Any] | None:
    """A, B and B - A over the mean of the benchmarks; None for a single one."""
    if len(comparisons) < 2:
        return None
    a, b = (sum(getattr(c, side) for c in comparisons) / len(comparisons) for side in ("a", "b"))
    return {"a": a, "b": b, "paired": average_difference([c.paired for c in comparisons])}


NOTE = (
    "Intervals and p-values are over questions and the answers that were drawn, for these two models. How much a "
    "training run with another seed differs is not in them: whether one way of training is better takes several seeds "
    "of each."
)


def verdict(difference: float, p_value: float) -> str:
    """Say in words whether B is better: better, worse, or no difference at 95 %. difference: B - A."""
    if p_value > 1 - LEVEL:
        return "no difference can be told"
    return "B is better" if difference > 0 else "B is worse"


def to_json(comparisons: Sequence[Comparison], average: Mapping[str, Any] | None, differ: list[str]) -> dict[str, Any]:
    """Return everything that was found, for the file of `--out`."""
    return {
        "format": FORMAT,
        "protocol_differences": differ,
        "benchmarks": {
            c.name: {**asdict(c), "verdict": verdict(c.paired.difference.mean, c.p_corrected)} for c in comparisons
        },
        "average": None if average is None else _average_to_json(average["paired"], average),
        "note": NOTE,
    }


def _average_to_json(paired: PairedDifference, average: Mapping[str, Any]) -> dict[str, Any]:
    return {**average, "paired": asdict(paired), "verdict": verdict(paired.difference.mean, paired.p_value)}
