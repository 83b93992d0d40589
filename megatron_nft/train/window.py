"""Which questions may be started, and which groups train next: the rule that keeps answers young and training unbiased.

Groups train in the order in which their questions were drawn, and a step trains the first N that are kept; so neither
the length nor the speed of an answer decides whether it is trained. Groups that teach nothing are passed over.

A question may be started only while fewer than (max_staleness + 1) x N groups before it are open: not trained, and not
known to be dropped. A group's place only ever gets smaller, by N in every step that trains others: one that was started
at place p in the generation of step t trains at step t + p // N <= t + max_staleness at the latest. While step t is
being trained its groups count no more, and the limit is max_staleness x N, at its start and whenever a group that is
dropped makes room. So no answer is thrown away for its age, unless the bound itself is lowered between two starts of a
run.

While syncs are put off (train/overlap.py) the engine is some versions behind the trainer, and what it generates is as
many syncs older when it trains: both limits are lower by N for each of them. Once max_staleness + 1 were put off, all
that was started before has been trained, and nothing may be started.

Every rank has a window of its own, and makes the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable


class Window:
    """The open groups of all ranks in draw order."""

    def __init__(self, open_draws: Iterable[int] = ()) -> None:
        """open_draws: of groups that are not decided yet."""
        self._is_kept = dict.fromkeys(sorted(open_draws), False)  # False: its answers are under way

    def room(self, limit: int) -> int:
        """How many questions may be started while fewer than `limit` groups are open."""
        return max(0, limit - len(self._is_kept))

    def start(self, draw: int) -> None:
        """Take note of a question that is started: the next one in draw order."""
        self._is_kept[draw] = False

    def decide(self, draw: int, *, kept: bool) -> None:
        """Take note of what becomes of an open group."""
        if kept:
            self._is_kept[draw] = True
        else:
            del self._is_kept[draw]

    def next_groups(self, count: int) -> list[int] | None:
        """The draws of the next `count` groups to train; None as long as one before the last of them is undecided."""
        first = list(self._is_kept.items())[:count]
        if len(first) < count or not all(kept for _, kept in first):
            return None
        return [draw for draw, _ in first]

    def remove(self, draws: Iterable[int]) -> None:
        """Take note of groups that are trained."""
        for draw in draws:
            del self._is_kept[draw]
