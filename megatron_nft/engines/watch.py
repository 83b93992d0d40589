"""Tells servers that work from servers that hang, while answers are under way.

An answer may take as long as it takes: no limit stands on a request. What counts is that the server moves: an answer
came from it, or its own sign of progress (`ProgressQuery`) changed. A server that does neither for
`rollout.server.stall_timeout_s` is given up: its requests end with a TimeoutError and are made elsewhere. A weight sync
pauses servers, with requests that wait in them; its seconds do not count, and a router keeps its servers meanwhile.

Of a server behind a router nobody knows which requests it has. It is withdrawn from the router instead, and its
requests end as soon as whoever started it has ended it; where nobody will, all requests through the router are made
again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

import httpx

from megatron_nft.engines.routed import Routed
from megatron_nft.engines.target import State, Target
from megatron_nft.engines.targets import Targets

LOOKS_PER_TIMEOUT = 8
MAX_PERIOD_S, MIN_PERIOD_S = 10.0, 0.2
LOOK_AT_DEAD_S = 1.0


class ProgressQuery(Protocol):
    """Asks a server for a number that differs from an earlier one if it has worked on requests in between.

    httpx.HTTPError, KeyError or ValueError where it does not answer, or says itself that it does not work.
    """

    async def __call__(self, url: str) -> float: ...


class Watch:
    """Looks at all servers as long as `run` runs, on the client's event loop."""

    def __init__(
        self, targets: Targets, progress: ProgressQuery, stall_timeout_s: float, on_stall: Callable[[str], bool]
    ) -> None:
        """on_stall: called with the URL of a server that was given up; whether that server will be ended."""
        self._targets, self._progress, self._on_stall = targets, progress, on_stall
        self._timeout_s = stall_timeout_s
        self._period_s = min(MAX_PERIOD_S, max(MIN_PERIOD_S, stall_timeout_s / LOOKS_PER_TIMEOUT))
        self._patience_s = max(self._timeout_s, self._period_s)  # for a server's answer to one question
        self._moved = False
        self._syncing, self._synced_at = False, 0.0

    @property
    def syncing(self) -> bool:
        """Whether a weight sync has paused the servers. Any thread may set it."""
        return self._syncing

    @syncing.setter
    def syncing(self, syncing: bool) -> None:
        self._syncing, self._synced_at = syncing, time.monotonic()

    def note(self) -> None:
        """Take note of progress that others saw."""
        self._moved = True

    def take_moved(self) -> bool:
        """Whether any server has moved since the last call. Any thread may call it."""
        moved, self._moved = self._moved, False
        return moved

    async def run(self) -> None:
        """Watch until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for target in self._targets:
                tasks.create_task(self._watch(target))
            if (routed := self._targets.routed) is not None:
                for server in routed.servers:
                    tasks.create_task(self._watch_routed(routed, server))

    async def _watch(self, target: Target) -> None:
        clock = time.monotonic
        seen: tuple[int, float | None] = (0, None)  # answers so far, the last sign of progress
        moved_at = clock()
        while True:
            await asyncio.sleep(min(self._period_s, LOOK_AT_DEAD_S) if target.down else self._period_s)
            if target.down:
                await self._targets.look(target)
            if not target.in_flight:
                moved_at = clock()
                continue
            answered, sign = seen
            # One that has answered has moved: it need not be asked.
            now_seen = (target.answered, sign if target.answered != answered else await self._sign(target.url, sign))
            if now_seen != seen:
                seen, moved_at = now_seen, clock()
                self.note()
            elif self._is_stalled(moved_at):
                target.give_up()
                self._on_stall(target.url)

    async def _watch_routed(self, routed: Routed, server: Target) -> None:
        clock = time.monotonic
        moved_at, state = clock(), State.READY
        may_have_requests = not server.down
        while True:
            works = state is State.READY
            await asyncio.sleep(self._period_s if works else min(self._period_s, LOOK_AT_DEAD_S))
            if not routed.is_watched(server):
                moved_at, state, may_have_requests = clock(), State.READY, not server.down
                continue
            if self._syncing:
                continue
            state = await self._state(server.url)
            if self._syncing:  # its version may be the new one, which is not yet the wanted one
                continue
            await routed.heed(server, state)
            if state is not State.SILENT:
                moved_at, may_have_requests = clock(), state is State.READY
            elif may_have_requests and self._is_stalled(moved_at):
                may_have_requests = False
                await routed.withdraw(server)
                if not self._on_stall(server.url):
                    routed.target.give_up()
            if state is State.READY:
                self.note()

    def _is_stalled(self, moved_at: float) -> bool:
        return not self._syncing and time.monotonic() - max(moved_at, self._synced_at) >= self._timeout_s

    async def _state(self, url: str) -> State:
        try:
            return await asyncio.wait_for(self._targets.state(url), self._patience_s)
        except TimeoutError:
            return State.SILENT

    async def _sign(self, url: str, last: float | None) -> float | None:
        """The server's sign of progress; `last` where it gives none."""
        try:
            return await asyncio.wait_for(self._progress(url), self._patience_s)
        except (httpx.HTTPError, KeyError, ValueError, TimeoutError):
            return last
