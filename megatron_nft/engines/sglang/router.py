"""sglang-router in front of SGLang servers: requests go through it, weights and questions about them to the servers.

The router balances requests by the load that it sees, but knows nothing of weight versions: by itself it would give
requests to a server that died and came back without weights. Invariant: after `admit`, the router's workers are the
servers that have the wanted version, and no others. The engine client calls it before every generation, whenever a
request failed, and when it sees that one of them has died or come back (routed.py).
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx

from megatron_nft.engines import keys
from megatron_nft.engines.engine import EngineError
from megatron_nft.engines.patience import start_timeout_s
from megatron_nft.engines.server import Server, ServerGroup
from megatron_nft.processes import clean_environment, free_port

if TYPE_CHECKING:
    from megatron_nft.config import ServerConfig
    from megatron_nft.engines.owners import Owners

HOST = "127.0.0.1"  # every machine has a router of its own, for its ranks alone
TIMEOUT_S, PATIENCE_S = 30.0, 5.0
REQUEST_TIMEOUT_S = 7 * 86400  # no limit: whether its servers move is what engines/watch.py looks at
POLL_S = 0.1


class Router:
    """A running router, as one rank sees it."""

    def __init__(self, url: str, key: str | None, owners: Owners, group: ServerGroup | None = None) -> None:
        """key: what the servers and the router itself ask for. owners: the rank that started it listens there.

        group: the router's process, where this rank started it; it is ended by `close`.
        """
        self.url, self._key, self._owners, self._group = url, key, owners, group

    @classmethod
    def start(cls, python: Path, config: ServerConfig, log_dir: Path, key: str | None, owners: Owners) -> Self:
        """See `routed.RequestRouter.start`. The process is watched like the servers."""
        server = Server(
            f"sglang-router on {os.uname().nodename}",
            router_command(python, config, guarded=key is not None),
            host=HOST,
            environment={},
            log_path=log_dir / f"sglang-router-{os.uname().nodename}.log",
            key=key,
        )
        group = ServerGroup(
            [server], start_timeout_s=start_timeout_s(config), max_restarts=config.max_restarts, owners=owners
        )
        return cls(server.url, key, owners, group)

    async def servers(self, client: httpx.AsyncClient) -> Collection[str]:
        """See `routed.RequestRouter.servers`."""
        return (await self._workers(client)).keys()

    async def admit(self, client: httpx.AsyncClient, urls: Collection[str]) -> Collection[str]:
        """See `routed.RequestRouter.admit`. EngineError where the router does not follow in time.

        A server that the router does not find healthy within PATIENCE_S is left for later, if there is another.
        """
        start = time.monotonic()
        asked: set[str] = set()  # it answers at once and works in the background
        while True:
            known = await self._workers(client)
            stale = {url for url in known if url not in urls}
            missing = {url for url in urls if url not in known or not known[url]["is_healthy"]}
            waited_s = time.monotonic() - start
            if not stale and (not missing or (waited_s > PATIENCE_S and len(missing) < len(urls))):
                return [url for url in urls if url not in missing]
            if waited_s > TIMEOUT_S:
                raise EngineError(f"{self.url} has {sorted(known)} after {TIMEOUT_S:.0f} s, wanted are {sorted(urls)}")
            for url in stale - asked:
                await client.delete(f"{self.url}/workers/{known[url]['id']}", timeout=TIMEOUT_S)
            for url in missing - known.keys() - asked:
                body = {"url": url} if self._key is None else {"url": url, "api_key": self._key}
                await client.post(f"{self.url}/workers", json=body, timeout=TIMEOUT_S)
            asked |= stale | missing
            await asyncio.sleep(POLL_S)

    async def _workers(self, client: httpx.AsyncClient) -> dict[str, dict[str, Any]]:
        """URL -> what the router says of that server."""
        response = await client.get(f"{self.url}/workers", timeout=TIMEOUT_S)
        response.raise_for_status()
        return {worker["url"].rstrip("/"): worker for worker in response.json()["workers"]}

    def end_hanging(self, quiet_s: float) -> None:
        """See `routed.RequestRouter.end_hanging`."""
        self._owners.tell_hanging(self.url, quiet_s)

    def renew(self) -> None:
        """See `routed.RequestRouter.renew`."""
        if self._group is not None:
            self._group.renew()

    def close(self) -> None:
        """End the router if this rank started it. May be called twice."""
        if self._group is not None:
            self._group.close()


def router_command(python: Path, config: ServerConfig, *, guarded: bool) -> list[str]:
    """The command of a router without workers, without --port. EngineError where the package is not installed."""
    asked = [str(python), "-c", "import sglang_router"]
    if subprocess.run(asked, capture_output=True, check=False, env=clean_environment()).returncode:
        raise EngineError(
            f"rollout.server.router: {python} has no sglang-router: install sglang-router there "
            "(bash tools/install_engine.sh sglang does), or set rollout.server.router=false"
        )
    arguments = {
        "host": HOST,
        # power_of_two needs workers at the start; cache_aware looks at text, and our prompts are token ids.
        "policy": "round_robin",
        "request-timeout-secs": REQUEST_TIMEOUT_S,
        "health-check-interval-secs": 5,
        "prometheus-host": HOST,
        "prometheus-port": free_port(HOST),
        "log-level": "warn",
    }
    given = (f"--{name}={value}" for name, value in arguments.items())
    module = [str(keys.FOLDER / "nft_sglang_router.py")] if guarded else ["-m", "sglang_router.launch_router"]
    return [str(python), *module, *given, *config.router_args]
