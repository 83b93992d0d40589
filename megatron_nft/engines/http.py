"""A rank's client of engine servers: which servers it asks, who starts them, and who learns of a failure."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_nft.distributed import gather_objects
from megatron_nft.engines import keys
from megatron_nft.engines.addresses import LOOPBACK, check_reachable, host_address, is_local
from megatron_nft.engines.client import HttpEngine
from megatron_nft.engines.discovery import wait_for_engines
from megatron_nft.engines.engine import NO_WEIGHTS, Engine, EngineError, OpenOptions
from megatron_nft.engines.host import find_python
from megatron_nft.engines.kind import ServerKind
from megatron_nft.engines.owners import Owners
from megatron_nft.engines.patience import start_timeout_s
from megatron_nft.engines.routed import RequestRouter
from megatron_nft.engines.server import ServerGroup
from megatron_nft.engines.sleep import SleepingServers
from megatron_nft.engines.start import start_servers
from megatron_nft.engines.versions import installed_version

if TYPE_CHECKING:
    from megatron_nft.config import RolloutConfig, ServerConfig


class _Hosts:
    """The hosts of all ranks, and this rank's place among them. Collective."""

    def __init__(self, options: OpenOptions) -> None:
        layout = options.layout
        self.group = layout.world_gloo if layout else None
        self.names = gather_objects(os.uname().nodename, self.group)  # by rank
        self.rank = layout.rank if layout else 0
        self.first_rank = self.names.index(self.names[self.rank])
        """The first rank of this rank's host: the one that starts what the host's ranks share."""

    @property
    def is_first(self) -> bool:
        return self.rank == self.first_rank

    def address(self, config: ServerConfig) -> str:
        """Where other ranks reach servers of this host. Collective. EngineError, on every rank, where they cannot."""
        check_reachable(config.host, self.names)
        return host_address(self.names, self.rank, self.group)

    def key(self, folder: Path) -> str:
        """A new key, the same on every rank; the first one keeps it in `folder` for the run's owner. Collective."""
        made, problem = "", ""
        if self.rank == 0:
            made = keys.new_key()
            try:
                keys.write_key(folder / keys.FILE, made)
            except OSError as e:
                problem = f"the key of the servers cannot be written: {e}"
        self.share([], problem)
        first: str = gather_objects(made, self.group)[0]
        return first

    def first_server(self, num_servers: int, *, of_all_ranks: bool) -> int:
        """Which of `num_servers` gets this rank's first request: those who ask the same ones begin far apart.

        of_all_ranks: every rank asks these servers, rather than those of this host alone.
        """
        asking = [r for r, name in enumerate(self.names) if of_all_ranks or name == self.names[self.rank]]
        return asking.index(self.rank) * num_servers // len(asking)

    def far_servers(self, started: list[list[str]]) -> list[str]:
        """Servers of the other hosts, for when those of this one are gone; ranks turn to different ones first.

        started: every rank's URLs of servers that it started.
        """
        far = [url for r, urls in enumerate(started) if r != self.first_rank for url in urls]
        turn = self.rank * len(far) // len(self.names)
        return far[turn:] + far[:turn]

    def share(self, urls: list[str], problem: str) -> list[list[str]]:
        """Every rank's URLs. If one has a problem, all raise EngineError, so that none waits for one that has ended."""
        found = gather_objects((urls, problem), self.group)
        problems = [f"on {host}: {text}" for host, (_, text) in zip(self.names, found, strict=True) if text]
        if problems:
            raise EngineError("\n".join(problems))
        return [urls for urls, _ in found]


def open_http_engine(kind: ServerKind, model_path: Path, rollout: RolloutConfig, options: OpenOptions) -> HttpEngine:
    """See `kind.EngineKind.open`."""
    config, hosts = rollout.server, _Hosts(options)
    version = 0 if options.load_weights else NO_WEIGHTS
    patience_s = start_timeout_s(config, model_path, version)
    given = _given_urls(config, patience_s)
    owners = _owners(config, given, options.log_dir, is_first_rank=hosts.rank == 0)
    urls, group, problem = given, None, ""
    address = LOOPBACK if given else hosts.address(config)
    key = _given_key(config) if given else None
    if not given and not is_local(address if config.host == "auto" else config.host):
        key = hosts.key(options.log_dir)
    if not given and hosts.is_first:
        try:
            group = start_servers(
                kind,
                model_path,
                rollout,
                precision=options.precision,
                device=options.layout.device if options.layout else "cpu",
                log_dir=options.log_dir,
                weight_version=version,
                address=address,
                key=key,
                owners=owners,
            )
            urls = group.urls
        except (EngineError, OSError) as e:  # OSError: rollout.server.host is no address of this host
            problem = str(e)
    try:
        started = hosts.share(urls, problem)
        router = _open_router(kind, config, hosts, options.log_dir, key) if config.router else None
    except EngineError:
        if group is not None:
            group.close()
        raise
    asked = given or started[hosts.first_rank]
    engine = kind.client(
        asked,
        config,
        weight_version=version,
        allow_version_change=options.allow_version_change,
        group=group,
        owners=owners,
        sleeping=_sleeping(kind, config, group, patience_s),
        all_urls=list(dict.fromkeys(url for urls in started for url in urls)),
        local_urls=None if given else asked,
        router=router,
        first=hosts.first_server(len(asked), of_all_ranks=bool(given)),
        far=() if given else hosts.far_servers(started),  # those that are given, every rank asks anyway
        key=key,
        patience_s=patience_s,
    )
    if given and options.load_weights:
        engine.adopt_version()
    return engine


def _given_urls(server: ServerConfig, timeout_s: float) -> list[str]:
    """Servers that others run: those of `urls`, or of the nodes that announce themselves; empty where we run them."""
    if server.urls or server.registry is None:
        return list(server.urls)
    return wait_for_engines(server.registry, server.registry_nodes, timeout_s)


def _owners(server: ServerConfig, given: list[str], log_dir: Path, *, is_first_rank: bool) -> Owners | None:
    """Where whoever started the servers is told of them; None where neither the run nor its engine nodes did."""
    if not given:
        return Owners(log_dir)  # a rank: `note_good_step` tells it of steps
    return None if server.urls or server.registry is None else Owners(server.registry, tells_steps=is_first_rank)


def _given_key(server: ServerConfig) -> str | None:
    """The key of servers that others run; None where they have none."""
    if server.key_file is not None:
        return keys.read_key(server.key_file)
    if server.urls or server.registry is None or not (server.registry / keys.FILE).exists():
        return None
    return keys.read_key(server.registry / keys.FILE)


def _sleeping(
    kind: ServerKind, config: ServerConfig, group: ServerGroup | None, timeout_s: float
) -> SleepingServers | None:
    """The servers that this rank started, where they release their memory while the trainer works."""
    if group is None or not config.memory_saver:
        return None
    return SleepingServers(group, kind.memory_calls[config.sleep_level], timeout_s)


def _open_router(
    kind: ServerKind, config: ServerConfig, hosts: _Hosts, log_dir: Path, key: str | None
) -> RequestRouter:
    """The router of this host, started by the host's first rank. Collective."""
    if kind.router is None:
        raise EngineError(f"rollout.server.router: {kind.name} has no router")
    router, problem, owners = None, "", Owners(log_dir)
    if hosts.is_first:
        try:
            router = kind.router.start(find_python(kind.name, config.python), config, log_dir, key, owners)
        except EngineError as e:
            problem = str(e)
    try:
        urls = hosts.share([router.url] if router else [], problem)
    except EngineError:
        if router is not None:
            router.close()
        raise
    return router or kind.router(urls[hosts.first_rank][0], key, owners)


@dataclass(frozen=True, kw_only=True)
class HttpEngineKind(ServerKind):
    """An engine that answers from servers of its own. See `kind.EngineKind`."""

    def open(self, model_path: Path, rollout: RolloutConfig, options: OpenOptions, /) -> Engine:
        """See `EngineKind.open`. Servers are started by the first rank of each host, for the ranks of that host."""
        return open_http_engine(self, model_path, rollout, options)

    def version(self, model_path: Path, server: ServerConfig, /) -> str:
        """See `EngineKind.version`."""
        if server.urls:
            return self.served_version(server.urls[0], model_path, _given_key(server))
        return f"{self.name} {installed_version(self.packages, find_python(self.name, server.python))}"
