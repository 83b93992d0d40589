"""Which server gets the next request: the servers of a rank, or the router in front of them."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import httpx

from megatron_nft.engines.engine import EngineError

if TYPE_CHECKING:
    from megatron_nft.config import ServerConfig


class RequestRouter(Protocol):
    """A process in front of the servers of one host, which spreads requests over them."""

    url: str

    def __init__(self, url: str, key: str | None) -> None:
        """A router that another rank started. key: what the servers ask for, see `keys`."""

    @classmethod
    def start(cls, python: Path, config: ServerConfig, log_dir: Path, key: str | None) -> Self:
        """Start a router without servers on this machine. EngineError if it does not come up."""
        ...

    async def admit(self, client: httpx.AsyncClient, urls: Collection[str]) -> None:
        """Make `urls` the only servers that get requests. httpx.HTTPError or EngineError where that fails."""
        ...

    def close(self) -> None:
        """End the router if this rank started it. May be called twice."""
        ...


class WeightsQuery(Protocol):
    """Asks a server whether it has the weights that answers must come from; False where it does not answer."""

    async def __call__(self, url: str) -> bool: ...


@dataclass(slots=True, eq=False)
class Target:
    """A server, or the router in front of all of them."""

    url: str
    in_flight: int = 0  # answers asked for and not there yet
    down: bool = False  # failed us; asked for its health and version before it gets another request


class Targets:
    """Where requests go. All methods run on the client's event loop."""

    def __init__(
        self,
        urls: Sequence[str],
        router: RequestRouter | None,
        client: httpx.AsyncClient,
        has_weights: WeightsQuery,
        first: int = 0,
    ) -> None:
        """first: the number of the server that gets the first request, so that ranks begin with different ones."""
        self._urls = [url.rstrip("/") for url in urls]
        self._router, self._client, self._has_weights = router, client, has_weights
        self._targets = [Target(router.url.rstrip("/"))] if router else [Target(url) for url in self._urls]
        self._admitting = asyncio.Lock()
        self._next = first % len(self._targets)

    async def refresh(self) -> None:
        """See which servers that were down have come back; called before a phase of generation."""
        if self._router is not None:
            self._targets[0].down = True  # it may have servers that came back without the weights
        await self._look_at_those_down()

    async def pick(self) -> Target | None:
        """Return the server with the fewest answers under way; where none is up, look again at those that are down.

        Of several, the next one in turn. Were it always the first, all ranks would give the same servers the answers
        that are left over when each server has as many as the others.
        """
        if all(t.down for t in self._targets):
            await self._look_at_those_down()
        in_turn = self._targets[self._next :] + self._targets[: self._next]
        found = min((t for t in in_turn if not t.down), key=lambda t: t.in_flight, default=None)
        if found is not None:
            self._next = (self._targets.index(found) + 1) % len(self._targets)
        return found

    @property
    def exhausted(self) -> bool:
        """Whether no server is left that might have the weights. A router may yet find one that came back."""
        return self._router is None and all(t.down for t in self._targets)

    async def _look_at_those_down(self) -> None:
        """Give requests again to servers that answer again and have the wanted weights."""

        async def look(target: Target) -> None:
            target.down = not await self._has_weights(target.url)

        if self._router is not None:
            await self._refresh_router(self._router)
        else:
            await asyncio.gather(*(look(t) for t in self._targets if t.down))

    async def _refresh_router(self, router: RequestRouter) -> None:
        """Give the router the servers that have the wanted weights. Requests that failed together do it once."""
        (target,) = self._targets
        async with self._admitting:
            if not target.down:
                return
            ready = await asyncio.gather(*(self._has_weights(url) for url in self._urls))
            found = [url for url, has in zip(self._urls, ready, strict=True) if has]
            try:
                await router.admit(self._client, found)
            except (httpx.HTTPError, EngineError, KeyError, ValueError):
                return  # the next try looks again
            target.down = not found
