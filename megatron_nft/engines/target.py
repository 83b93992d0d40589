"""A server as a client sees it: what it has to do, and in which state it is."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol


class State(Enum):
    """What a server is good for at this moment."""

    READY = "works, and has the weights that answers must come from"
    BEHIND = "works without these weights: it died and came back"
    SILENT = "gives no answer, or says itself that it does not work"
    GONE = "nobody listens at its address"


class StateQuery(Protocol):
    """Asks a server for its state."""

    async def __call__(self, url: str) -> State: ...


@dataclass(slots=True, eq=False)
class Target:
    """A server, or the router in front of several."""

    url: str
    near: bool = True  # of this rank's host, or given to all ranks
    in_flight: int = 0  # answers asked for and not there yet
    answered: int = 0
    down: bool = False  # failed us; asked for its state before it gets another request
    waits: set[asyncio.Timeout] = field(default_factory=set)  # one for each request under way

    def give_up(self) -> None:
        """End all requests under way with a TimeoutError, and send no more."""
        self.down = True
        for wait in self.waits:
            wait.reschedule(0.0)
