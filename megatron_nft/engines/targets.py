"""Which server makes the next answer: one of the rank's own, its router, or another host's when its own are gone.

Every answer is a request of its own. Rules, in this order:
- a server that failed gets nothing until it works again and has the wanted weights;
- servers of the rank's own host share its answers alike; what those that are left there cannot take without more than
  their share, because others are down, goes to the other hosts' servers, all alike;
- answers to one question stay on one server, which then computes the prompt once, as long as it has no more than its
  share or `KEEP` times what the emptiest one has: an uneven load costs more than a prompt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import httpx

from megatron_nft.engines.routed import RequestRouter, Routed
from megatron_nft.engines.target import State, StateQuery, Target

KEEP = 1.25
LOOK_AGAIN_S = 1.0  # where no server is up


class Targets:
    """Where requests go. All methods run on the client's event loop."""

    def __init__(
        self,
        urls: Sequence[str],
        router: RequestRouter | None,
        client: httpx.AsyncClient,
        state: StateQuery,
        first: int = 0,
        far: Sequence[str] = (),
    ) -> None:
        """first: the number of the server that gets the first request, so that ranks begin with different ones.

        far: servers of other hosts, in the order in which they are turned to.
        """
        urls, far = [url.rstrip("/") for url in urls], [url.rstrip("/") for url in far]
        self._state = state
        self.routed = Routed(router, urls, far, client, self.state) if router else None
        """The servers behind the router, where there is one."""
        near = [self.routed.target] if self.routed else [Target(url) for url in urls]
        self._targets = near + ([] if self.routed else [Target(url, near=False) for url in far])
        self._num_near = len(near)
        self._looking = asyncio.Lock()
        self._num_looks = 0
        self._next = first % len(near)
        self._streamed: dict[object, int] = {}  # answers under way in each open stream
        self._share = 1  # answers under way on each near server, or one more, if all are up
        self._of_question: dict[int, Target] = {}
        self.behind: set[str] = set()
        """URLs of servers that work and lack the wanted weights: they died and came back."""
        self._num_weights = 0

    def __iter__(self) -> Iterator[Target]:
        return iter(self._targets)

    @property
    def busy(self) -> list[str]:
        """URLs of servers that may have requests of ours."""
        if self.routed is not None:
            return [target.url for target in self.routed.servers]
        return [target.url for target in self._targets if target.in_flight]

    def note_new_weights(self) -> None:
        """Take note that weights were brought: who lacks them now, the next look says. Any thread may call it."""
        self._num_weights += 1
        self.behind.clear()

    async def begin(self, num_in_flight: int) -> None:
        """See which servers that were down have come back, before a phase of generation.

        num_in_flight: answers that will be under way at once, beside those of open streams.
        """
        if not self._streamed:
            self._of_question = {}
        self._share_out(num_in_flight)
        if self.routed is not None:
            self.routed.target.down = True  # it may have servers that came back without the weights
        await self.look_at_those_down()

    def forget(self, question: int) -> None:
        """Take note that no more answers to a question are asked for."""
        self._of_question.pop(question, None)

    def expect(self, stream: object, num_in_flight: int) -> None:
        """Take note of how many answers of a stream will be under way at once from here on; 0 once it has ended."""
        self._streamed[stream] = num_in_flight
        if not num_in_flight:
            del self._streamed[stream]
        self._share_out(0)

    def _share_out(self, num_in_flight: int) -> None:
        """num_in_flight: beside those of the streams."""
        self._share = max(1, (sum(self._streamed.values()) + num_in_flight) // self._num_near)

    async def pick(self, question: int | None = None) -> Target | None:
        """Return the server for one answer to a question; None where none is up, after another look at them.

        Of several with the same load, the next one in turn. Were it always the first, all ranks would give the same
        servers the answers that are left over when each server has as many as the others.
        """
        if all(t.down for t in self._targets):
            await self._look_once()
        up = [t for t in self._targets if not t.down]
        if not up:
            return None
        kept = self._of_question.get(question) if question is not None else None
        if kept in up and self._may_keep(kept, up):
            return kept
        in_turn = [t for t in self._targets[self._next :] + self._targets[: self._next] if not t.down]
        found = min(in_turn, key=lambda t: (self._load(t), not t.near))
        self._next = (self._targets.index(found) + 1) % len(self._targets)
        if question is not None:
            self._of_question[question] = found
        return found

    def _load(self, target: Target) -> int:
        """Answers under way. Servers of another host have a share of that host's ranks, of which we do not know."""
        return target.in_flight + (0 if target.near else self._share)

    def _may_keep(self, target: Target, up: Sequence[Target]) -> bool:
        load = self._load(target)
        return load < self._share or load <= KEEP * min(map(self._load, up))

    @property
    def exhausted(self) -> bool:
        """Whether no server is left that might have the weights. A router may yet find one that came back."""
        return self.routed is None and all(t.down for t in self._targets)

    async def _look_once(self) -> None:
        """Look at servers when all are down. Of the requests that wait, one looks, and the others go by that."""
        seen = self._num_looks
        async with self._looking:
            if self._num_looks != seen or not all(t.down for t in self._targets):
                return
            await self.look_at_those_down()
            if all(t.down for t in self._targets):
                await asyncio.sleep(LOOK_AGAIN_S)
            self._num_looks += 1

    async def look_at_those_down(self) -> None:
        """Give requests again to servers that work again and have the wanted weights."""
        if self.routed is None:
            await asyncio.gather(*(self._look(t) for t in self._targets if t.down))
        elif self.routed.target.down:
            await self.routed.refresh()

    async def look(self, target: Target) -> None:
        """Look at one of those down, while answers are under way."""
        if self.routed is not None:
            await self._look_once()
        else:
            await self._look(target)

    async def _look(self, target: Target) -> None:
        target.down = await self.state(target.url) is not State.READY

    async def state(self, url: str) -> State:
        """Ask a server for its state, and take note of one that is `behind`."""
        num_weights = self._num_weights
        state = await self._state(url)
        if state is State.BEHIND and num_weights == self._num_weights:  # else weights have come since it was asked
            self.behind.add(url)
        else:
            self.behind.discard(url)
        return state
