"""Rounds of generation on a thread of its own, while the trainer trains.

Ranks agree in them on which groups are complete, and so on which questions may be started: a group that turns out to be
dropped makes room for another question at once, rather than after the step. They meet over a group of their own, which
nothing else uses: the ranks' main threads are in collectives of the training meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_nft.distributed import gather_objects
from megatron_nft.train.background import Background

if TYPE_CHECKING:
    import torch.distributed as dist

PERIOD_S = 0.25
CLOSE_TIMEOUT_S = 5.0

Meet = Callable[[Any], list[Any]]
"""What every rank tells in a round, in rank order. Collective."""


class Meanwhile:
    """One rank's thread. All ranks start and end it at the same points of a step."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """group: gloo ranks of the whole world; None where this process is the only one."""
        self._group, self._thread = group, Background("producer")
        self._ends = threading.Event()

    def start(self, one_round: Callable[[Meet], None]) -> None:
        """Call `one_round` about every PERIOD_S seconds, as often on every rank, until one of them ends it."""
        self._ends.clear()
        self._thread.start(lambda: self._run(one_round))

    def end(self) -> None:
        """Return after the last round, in which every rank takes part. Raises what a round raised."""
        self._ends.set()
        if error := self._thread.wait():
            raise error

    def close(self) -> None:
        """End it on this rank where the run ends early: other ranks may be gone."""
        self._ends.set()
        self._thread.wait(CLOSE_TIMEOUT_S)

    def _run(self, one_round: Callable[[Meet], None]) -> None:
        is_last = False

        def meet(told: Any) -> list[Any]:
            nonlocal is_last
            ranks = gather_objects((told, self._ends.is_set()), self._group)
            is_last = any(ends for _, ends in ranks)
            return [told for told, _ in ranks]

        while not is_last:
            self._ends.wait(PERIOD_S)
            one_round(meet)
