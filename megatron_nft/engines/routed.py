"""The servers behind a router, as one rank sees them.

A router spreads requests and makes those of a server that died again by itself, so no failed request says which server
it was, and it would give requests to one that came back without weights. So the servers are looked at one by one while
answers are under way (watch.py), and the router has those that have the wanted weights and no others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import httpx

from megatron_nft.engines.engine import EngineError
from megatron_nft.engines.target import State, StateQuery, Target

if TYPE_CHECKING:
    from megatron_nft.config import ServerConfig
    from megatron_nft.engines.owners import Owners


class RequestRouter(Protocol):
    """A process in front of the servers of one host, which spreads requests over them.

    Only for engines whose sign of progress (`watch.ProgressQuery`) changes on a server without requests too: nobody
    knows to which one the router has given them.
    """

    url: str

    def __init__(self, url: str, key: str | None, owners: Owners) -> None:
        """A router that another rank started. key: what the servers ask for, see `keys`. owners: of the router."""

    @classmethod
    def start(cls, python: Path, config: ServerConfig, log_dir: Path, key: str | None, owners: Owners) -> Self:
        """Start a router without servers on this machine. EngineError if it does not come up."""
        ...

    async def servers(self, client: httpx.AsyncClient) -> Collection[str]:
        """URLs of the servers that get requests. httpx.HTTPError, KeyError or ValueError where it does not answer."""
        ...

    async def admit(self, client: httpx.AsyncClient, urls: Collection[str]) -> Collection[str]:
        """Make `urls` the only servers that get requests; returns those of them that do by now.

        httpx.HTTPError or EngineError where none does, or another one still does.
        """
        ...

    def end_hanging(self, quiet_s: float) -> None:
        """Have the router ended and started again, which did not answer for `quiet_s` seconds. OSError."""
        ...

    def renew(self) -> None:
        """Let the router be started again as often as at first, if this rank started it."""
        ...

    def close(self) -> None:
        """End the router if this rank started it. May be called twice."""
        ...


class Routed:
    """The router and its servers. All methods run on the client's event loop."""

    def __init__(
        self,
        router: RequestRouter,
        urls: Sequence[str],
        far: Sequence[str],
        client: httpx.AsyncClient,
        state: StateQuery,
    ) -> None:
        """urls: of the servers of this host. far: of other hosts', for when those of this one are gone."""
        self.target = Target(router.url.rstrip("/"))
        self.servers = [Target(url) for url in urls] + [Target(url, near=False) for url in far]
        self._router, self._client, self._state = router, client, state
        self._admitted: list[str] = []
        self._admitting = asyncio.Lock()

    def is_watched(self, server: Target) -> bool:
        """Whether the state of a server matters: answers are under way, and it may make some of them."""
        return bool(self.target.in_flight) and (server.near or server.url in self._admitted)

    async def refresh(self) -> None:
        """Give the router the servers that have the wanted weights: of this host, else of the others."""
        ready: list[str] = []
        for near in (True, False):
            urls = [server.url for server in self.servers if server.near == near]
            states = await asyncio.gather(*(self._state(url) for url in urls))
            ready = [url for url, state in zip(urls, states, strict=True) if state is State.READY]
            if ready:
                break
        await self._admit(ready)

    async def heed(self, server: Target, state: State) -> None:
        """Tell the router where a server's state is another than it was. One that is silent may only be slow."""
        if state is not State.SILENT and (state is State.READY) == server.down:
            await self.refresh()

    async def withdraw(self, server: Target) -> None:
        """Let a server get no more requests; those that it has stay with it."""
        server.down = True
        await self._admit([url for url in self._admitted if url != server.url])

    def end_hanging(self, quiet_s: float) -> None:
        """See `RequestRouter.end_hanging`."""
        self._router.end_hanging(quiet_s)

    async def check(self) -> None:
        """Ask the router for something. httpx.HTTPError, KeyError or ValueError where it does not answer."""
        await self._router.servers(self._client)

    async def _admit(self, urls: list[str]) -> None:
        async with self._admitting:
            try:
                admitted = await self._router.admit(self._client, urls)
            except (httpx.HTTPError, EngineError, KeyError, ValueError):
                self.target.down = True  # the next request has it looked at again
                return
            # One that is ready and was not taken yet counts as down: the next look asks the router again.
            self._admitted = [url for url in urls if url in admitted]
            for server in self.servers:
                server.down = server.url not in self._admitted
            self.target.down = not self._admitted
