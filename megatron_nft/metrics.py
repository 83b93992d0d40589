"""Metrics that own their reduction, and the sinks that they go to.

A rank adds what it knows (`mean` with a weight, `sum`, `max`, `histogram`); `Metrics.merge` combines ranks, so nobody
averages averages. Sinks write one flat record per step: metrics.jsonl, TensorBoard, W&B, console. A value of None is
null in metrics.jsonl and a hole in the curves of the others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_nft.files import write_atomically

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over everything that is counted, such as tokens. Tensors of any shape are summed over their elements."""

    total: Tensor | float
    count: Tensor | float


@dataclass(frozen=True, slots=True)
class Max:
    """The largest of what was seen. A tensor stands for its largest element, an empty one for nothing."""

    value: Tensor | float


class Metrics:
    """The metrics of one step on one rank.

    Each name has one kind of reduction for its whole life; adding it as another kind is a ValueError.
    """

    def __init__(self, *states: Mapping[str, tuple[str, Any]]) -> None:
        """What the `states` of ranks, or of a process before this one, hold together."""
        self._kind: dict[str, str] = {}
        self._value: dict[str, Any] = {}
        for state in states:
            for name, (kind, value) in state.items():
                getattr(self, kind)(name, *(value if kind == "mean" else (value,)))

    def _slot(self, name: str, kind: str, start: Any) -> Any:
        if self._kind.setdefault(name, kind) != kind:
            raise ValueError(f"metric {name} is a {self._kind[name]}, and cannot take a {kind}")
        return self._value.setdefault(name, start)

    def mean(self, name: str, total: float, count: float) -> None:
        """A mean over everything that is counted: add the sum and the number of items."""
        t, c = self._slot(name, "mean", (0.0, 0.0))
        self._value[name] = (t + float(total), c + float(count))

    def add(self, name: str, value: Mean | Max) -> None:
        """A mean or a maximum whose parts are numbers."""
        if isinstance(value, Mean):
            self.mean(name, float(value.total), float(value.count))
        else:
            self.max(name, float(value.value))

    def sum(self, name: str, value: float) -> None:
        """A total over ranks and calls."""
        self._value[name] = self._slot(name, "sum", 0.0) + float(value)

    def max(self, name: str, value: float) -> None:
        """The largest over ranks and calls; a NaN stays visible."""
        old = self._slot(name, "max", -math.inf)
        self._value[name] = float(value) if math.isnan(value) else max(old, float(value))

    def histogram(self, name: str, counts: Sequence[int]) -> None:
        """Counts per bin, added up."""
        old = self._slot(name, "histogram", [0] * len(counts))
        self._value[name] = [a + int(b) for a, b in zip(old, counts, strict=True)]

    def state(self) -> dict[str, tuple[str, Any]]:
        """What `merge` takes from each rank; survives JSON."""
        return {name: (kind, self._value[name]) for name, kind in self._kind.items()}

    @staticmethod
    def merge(states: Iterable[dict[str, tuple[str, Any]]]) -> dict[str, float | list[int] | None]:
        """Combine the ranks' states into one flat record; a mean or maximum of nothing is None."""
        total = Metrics(*states)
        out: dict[str, float | list[int] | None] = {}
        for name, kind in total._kind.items():
            value = total._value[name]
            if kind == "mean":
                out[name] = value[0] / value[1] if value[1] > 0 else None
            else:
                out[name] = None if kind == "max" and value == -math.inf else value
        return out


class Sink(Protocol):
    """Somewhere a step's record goes."""

    def write(self, step: int, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def _json_number(value: Any) -> Any:
    """JSON has no NaN: such numbers are written as strings ("nan", "inf")."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {k: _json_number(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_json_number(v) for v in value]
    return value


class JsonlSink:
    """metrics.jsonl: one object per step. A resumed run first drops the steps that it will do again.

    `last_step` is the newest that was found and kept, None without one.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        kept: dict[int, str] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    step = json.loads(line)["step"]
                    if step < first_step:
                        kept[step] = line
                except (ValueError, KeyError, TypeError):  # the line that a killed run was writing
                    continue
        write_atomically(path, "".join(f"{line}\n" for line in kept.values()))
        self.last_step = max(kept, default=None)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(_json_number({"step": step, **record})) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """Scalars and histograms for TensorBoard; events after a resumed step are purged by TensorBoard itself."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step or None)

    def write(self, step: int, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, list):
                _write_histogram(self._writer, name, value, step)
            elif isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _write_histogram(writer: Any, name: str, counts: list[int], step: int) -> None:
    """Counts of equal bins over [0, 1]."""
    import numpy as np  # algorithms import this module, and their settings must be readable without it

    if not sum(counts):
        return
    edges = np.linspace(0, 1, len(counts) + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    writer.add_histogram_raw(
        name,
        min=0.0,
        max=1.0,
        num=sum(counts),
        sum=float(np.dot(counts, middles)),
        sum_squares=float(np.dot(counts, middles**2)),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=counts,
        global_step=step,
    )


class WandbSink:
    """Weights & Biases; the key comes from the environment and is never logged."""

    def __init__(self, project: str, run_dir: Path, settings: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ValueError(
                f"metrics.wandb_project={project!r} needs Weights & Biases: pip install 'megatron_nft[wandb]'"
            ) from None
        self._run = wandb.init(
            project=project, name=run_dir.name, id=run_dir.name, resume="allow", dir=str(run_dir), config=settings
        )

    def write(self, step: int, record: dict[str, Any]) -> None:
        numbers = {k: v for k, v in record.items() if v is not None and not isinstance(v, list)}
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()
