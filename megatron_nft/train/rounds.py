"""What ranks tell each other while each generates at its own pace: who is done, who was stopped, what moves.

Each rank has one gather of a few numbers under way, which it starts anew about once a second; nobody waits for it but
ranks that have all their answers. All see the same rounds with the same numbers, and act on one in the same place:

- a stop signal on one rank ends generation on all of them within seconds;
- a server that died and came back gets the weights while the answers of the others go on: the requests run on the
  engine client's thread, so the ranks' own threads are free to meet in the collectives of a weight sync, and answers
  that arrive meanwhile wait in a queue. A sync that waited for the end of the batch would leave the server idle for
  what is often the whole generation of a step; a peer's copy or a folder of weights would be a second way to bring
  weights, without the checks of the first;
- as long as one rank makes progress, the others that wait for it are not taken for stalled.

Where answers outlive a step, ranks `meet` instead: they all come to a round at about the same time, with what it tells.
There they also see that an evaluation beside the training has all of its answers, on every rank.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from megatron_nft.distributed import NumbersUnderWay, gather_objects
from megatron_nft.train.lifecycle import Interrupted, Lifecycle

if TYPE_CHECKING:
    import torch.distributed as dist

T = TypeVar("T")

PERIOD_S = 1.0
MAX_TRIES = 3  # to bring the weights to a server that came back, in one phase of generation

Readmit = Callable[[list[str]], None]
"""Brings the weights to servers, named by their URLs. Collective."""


class Beside(Protocol):
    """Held-out questions under way beside the training. See `evaluation.Evaluation`."""

    def look(self) -> bool: ...

    @property
    def is_answered(self) -> bool: ...


class Rounds:
    """One rank's part in the rounds of a phase of generation. All ranks make one, and call `wait_for_all` in the end.

    It may be used for several batches: after `wait_for_all` has returned 0, the next one begins.
    """

    def __init__(
        self,
        life: Lifecycle,
        group: dist.ProcessGroup | None,
        left_behind: Callable[[], Sequence[str]] = tuple,
        readmit: Readmit | None = None,
        beside: Callable[[], Beside | None] = lambda: None,
        end_beside: Callable[[], object] = lambda: None,
    ) -> None:
        """left_behind: see `engine.Engine.left_behind`. readmit: called for the servers that any rank names.

        beside: the evaluation under way, the same on every rank. end_beside: called when it is answered on all.
        """
        self._life, self._group = life, group
        self._left_behind, self._readmit = left_behind, readmit
        self._beside, self._end_beside = beside, end_beside
        self._under_way: NumbersUnderWay | None = None
        self._next = time.monotonic() + PERIOD_S
        self._moved = False  # since the last round was started
        self._tries: Counter[str] = Counter()  # URL -> how often it was given the weights
        self._signum = 0
        self._over = False

    def on_wait(self, moved: bool) -> None:
        """See `engine.OnWait`. Interrupted where this rank has a stop signal, or another had one."""
        if moved:
            self._moved = True
            self._life.phases.progress()
        self._life.stop.check()
        if self._under_way is None and time.monotonic() >= self._next:
            self._start(done=False)
        if self._under_way is not None and self._under_way.is_there:
            self._end_round()
            if self._signum:
                raise Interrupted(self._signum)

    def wait_for_all(self) -> int:
        """Wait until all ranks have their answers, or one was stopped: returns its signal, 0 without one.

        The same on every rank.
        """
        with self._life.phases.waiting():
            while not self._over:
                if self._under_way is None:
                    self._start(done=True)
                self._end_round()
        self._over = bool(self._signum)
        return self._signum

    def meet(self, told: T, moved: bool) -> list[T]:
        """What every rank tells, in rank order, in a round that all take part in at once. Collective.

        moved: whether this rank's engine has made progress. Interrupted, on every rank, after a stop signal on any.
        """
        beside = self._beside()
        if beside is not None:
            moved |= beside.look()
        is_over = beside is not None and beside.is_answered
        with self._life.phases.waiting():
            ranks = gather_objects((told, self._life.stop.signum, moved, is_over, self._in_want()), self._group)
        if any(rank[2] for rank in ranks):
            self._life.phases.progress()
        if signum := max(rank[1] for rank in ranks):
            raise Interrupted(signum)
        if all(rank[3] for rank in ranks):
            self._end_beside()  # servers that want weights may have got them with that
        else:
            self._bring_weights([rank[4] for rank in ranks])
        return [rank[0] for rank in ranks]

    def _start(self, *, done: bool) -> None:
        wants_weights = bool(self._in_want())
        self._under_way = NumbersUnderWay([done, self._life.stop.signum, self._moved, wants_weights], self._group)
        self._moved = False

    def _end_round(self) -> None:
        """Wait for the numbers of the round under way, and act on them."""
        assert self._under_way is not None
        ranks = self._under_way.result()
        self._under_way, self._next = None, time.monotonic() + PERIOD_S
        done, signals, moved, want_weights = zip(*ranks, strict=True)
        self._signum = max(signals)
        self._over = all(done) or bool(self._signum)
        if any(moved):
            self._life.phases.progress()
        if any(want_weights) and not self._over and self._readmit is not None:
            self._bring_weights(gather_objects(self._in_want(), self._group))

    def _bring_weights(self, wanted: Sequence[Sequence[str]]) -> None:
        """To the servers that any rank names, the same on every rank. Collective."""
        urls = sorted({url for of_rank in wanted for url in of_rank})
        self._tries.update(urls)
        if urls and self._readmit is not None:
            self._readmit(urls)

    def _in_want(self) -> list[str]:
        """Servers without the weights that may have them. The tries are the same on every rank."""
        return [url for url in self._left_behind() if self._readmit and self._tries[url] < MAX_TRIES]
