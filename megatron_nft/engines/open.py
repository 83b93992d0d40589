"""The engine that the settings ask for, on every rank."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from megatron_nft.distributed import gather_objects
from megatron_nft.engines.discovery import wait_for_engines
from megatron_nft.engines.engine import Engine, EngineError

if TYPE_CHECKING:
    import torch

    from megatron_nft.config import Config, RolloutConfig, ServerConfig
    from megatron_nft.engines.server import ServerGroup
    from megatron_nft.engines.sglang.router import Router
    from megatron_nft.engines.sleep import SleepingServers

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
CLIENTS = {"sglang": "SGLangEngine", "vllm": "VLLMEngine"}
NO_WEIGHTS = -1


class Ranks(Protocol):
    """The part of `policy.parallel.ParallelLayout` that is used here."""

    rank: int
    world_size: int
    device: torch.device
    world_gloo: Any  # process group of all ranks, host memory


def create_engine(config: Config, layout: Ranks) -> Engine:
    """This rank's engine for training. Collective. The first weight sync brings the weights."""
    return open_engine(
        config.model.path,
        config.rollout,
        precision=config.policy.precision,
        log_dir=config.run_dir / "engines",
        layout=layout,
        load_weights=False,
        allow_version_change=config.sync.in_flight != "finish",
    )


def open_engine(
    model_path: Path,
    rollout: RolloutConfig,
    *,
    precision: str,
    log_dir: Path,
    layout: Ranks | None = None,
    load_weights: bool = True,
    allow_version_change: bool = False,
) -> Engine:
    """An engine for the model folder; collective where `layout` has several ranks. EngineError where none can be had.

    precision: fp32 | bf16, of an engine whose dtype is not set. log_dir: where servers that are started here write.
    load_weights=False: the engine gives no answers until a weight sync has brought it a version.
    Servers are started by the first rank of each host, for the ranks of that host.
    """
    device = layout.device if layout else "cpu"
    host = os.uname().nodename
    hosts = gather_objects(host, layout.world_gloo if layout else None)
    if rollout.engine == "embedded":
        from megatron_nft.engines.embedded.engine import EmbeddedEngine

        return EmbeddedEngine.create(
            model_path,
            dtype=DTYPES[precision],
            device=device,
            batch_tokens=rollout.embedded_batch_tokens,
            num_copies=hosts.count(host),
            load_weights=load_weights,
        )
    version = 0 if load_weights else NO_WEIGHTS
    given = _given_urls(rollout.server)
    urls, group, problem = given, None, ""
    if not given and hosts.index(host) == (layout.rank if layout else 0):
        try:
            group = start_servers(
                model_path, rollout, precision=precision, device=device, log_dir=log_dir, weight_version=version
            )
            urls = group.urls
        except EngineError as e:
            problem = str(e)
    started = _share(layout, hosts, urls, problem, group)
    router = _open_router(rollout, layout, hosts, log_dir, group) if rollout.server.router else None
    engine = _client(rollout.engine)(
        given or started[hosts.index(host)],
        rollout.server,
        weight_version=version,
        allow_version_change=allow_version_change,
        group=group,
        sleeping=_sleeping(rollout, group),
        all_urls=list(dict.fromkeys(url for urls in started for url in urls)),
        router=router,
    )
    if given and load_weights:
        engine.adopt_version()
    return engine


def _sleeping(rollout: RolloutConfig, group: ServerGroup | None) -> SleepingServers | None:
    """The servers that this rank started, where they release their memory while the trainer works."""
    from megatron_nft.engines.sleep import SleepingServers

    server = rollout.server
    if group is None or not server.memory_saver:
        return None
    memory = importlib.import_module(f"megatron_nft.engines.{rollout.engine}.memory")
    return SleepingServers(group, memory.MEMORY_CALLS[server.sleep_level], server.start_timeout_s)


def _share(
    layout: Ranks | None, hosts: list[str], urls: list[str], problem: str, group: ServerGroup | None
) -> list[list[str]]:
    """Every rank's URLs. If one has a problem, all raise EngineError, so that none waits for one that has ended."""
    found = gather_objects((urls, problem), layout.world_gloo if layout else None)
    problems = [f"on {h}: {p}" for h, (_, p) in zip(hosts, found) if p]
    if problems:
        if group is not None:
            group.close()
        raise EngineError("\n".join(problems))
    return [urls for urls, _ in found]


def _open_router(
    rollout: RolloutConfig, layout: Ranks | None, hosts: list[str], log_dir: Path, group: ServerGroup | None
) -> Router:
    """The router of this host, started by the host's first rank. Collective."""
    from megatron_nft.engines.sglang.router import Router, start_router

    first, router, problem = hosts.index(hosts[layout.rank if layout else 0]), None, ""
    if first == (layout.rank if layout else 0):
        try:
            router = start_router(find_python(rollout.engine, rollout.server.python), rollout.server, log_dir)
        except EngineError as e:
            problem = str(e)
    try:
        urls = _share(layout, hosts, [router.url] if router else [], problem, group)
    except EngineError:
        if router is not None:
            router.close()
        raise
    return router or Router(urls[first][0])


def _given_urls(server: ServerConfig) -> list[str]:
    """Servers that others run: those of `urls`, or of the nodes that announce themselves; empty where we run them."""
    if server.urls or server.registry is None:
        return list(server.urls)
    return wait_for_engines(server.registry, server.registry_nodes, server.start_timeout_s)


def start_servers(
    model_path: Path,
    rollout: RolloutConfig,
    *,
    precision: str,
    device: torch.device | str,
    log_dir: Path,
    weight_version: int,
) -> ServerGroup:
    """`rollout.server.num_servers` healthy servers on this host, each with a log in `log_dir`. EngineError if not."""
    from megatron_nft.engines.server import Server, ServerGroup

    config, host = rollout.server, os.uname().nodename
    module = _module(rollout.engine)
    kind = config.device if config.device != "auto" else getattr(device, "type", device)
    dtype = config.dtype if config.dtype != "auto" else DTYPES[precision]
    python = find_python(rollout.engine, config.python)
    servers = [
        Server(
            f"{rollout.engine} server {i} on {host}",
            module.command_line(
                python,
                model_path,
                config,
                device=kind,
                dtype=dtype,
                gpu=i * config.tensor_parallel_size,
                weight_version=weight_version,
            ),
            host=config.host,
            environment=_merged(
                module.environment(config, device=kind, gpu=i * config.tensor_parallel_size), config.env
            ),
            log_path=log_dir / f"{rollout.engine}-{host}-{i}.log",
        )
        for i in range(config.num_servers)
    ]
    group = ServerGroup(servers, start_timeout_s=config.start_timeout_s, max_restarts=config.max_restarts)
    try:
        for url in group.urls:
            module.set_version(url, weight_version)
    except BaseException:
        group.close()
        raise
    return group


def _merged(ours: dict[str, str], given: dict[str, str]) -> dict[str, str]:
    """The settings' variables win; of PYTHONPATH both are kept, since ours holds vLLM's weight receiver."""
    merged = {**ours, **given}
    if "PYTHONPATH" in ours and "PYTHONPATH" in given:
        merged["PYTHONPATH"] = os.pathsep.join((given["PYTHONPATH"], ours["PYTHONPATH"]))
    return merged


def find_python(engine: str, python: Path | None) -> Path:
    """The interpreter that has the engine: the one that is set, the checkout's .venv-ENGINE, or our own."""
    if python is not None:
        if not os.access(python, os.X_OK):
            raise EngineError(f"rollout.server.python={python}: is not an executable file")
        return python
    venv = Path(__file__).parents[2] / f".venv-{engine}" / "bin" / "python"
    if venv.is_file():
        return venv
    if importlib.util.find_spec(engine) is not None:
        return Path(sys.executable)
    raise EngineError(
        f"no environment with {engine} was found: run `bash tools/install_engine.sh {engine}` in the checkout, "
        "set rollout.server.python to an interpreter that has it, or give the servers by rollout.server.urls"
    )


def _module(engine: str) -> ModuleType:
    return importlib.import_module(f"megatron_nft.engines.{engine}.client")


def _client(engine: str) -> Any:
    return getattr(_module(engine), CLIENTS[engine])
