"""Servers of this host: their commands and their start."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_nft.engines import keys
from megatron_nft.engines.addresses import ALL_INTERFACES, LOOPBACK
from megatron_nft.engines.engine import DTYPES, NO_WEIGHTS, EngineError
from megatron_nft.engines.host import find_python, one_host_problem
from megatron_nft.engines.patience import start_timeout_s
from megatron_nft.engines.server import Server, ServerGroup

if TYPE_CHECKING:
    import torch

    from megatron_nft.config import RolloutConfig
    from megatron_nft.engines.kind import ServerKind
    from megatron_nft.engines.owners import Owners


def start_servers(
    kind: ServerKind,
    model_path: Path,
    rollout: RolloutConfig,
    *,
    precision: str,
    device: torch.device | str,
    log_dir: Path,
    weight_version: int,
    address: str = LOOPBACK,
    key: str | None = None,
    owners: Owners | None = None,
) -> ServerGroup:
    """`rollout.server.num_servers` healthy servers on this host, each with a log in `log_dir`. EngineError if not.

    address: this host's, at which they are called; they listen there too, unless rollout.server.host says otherwise.
    key: what they ask of whoever calls them; None for servers that answer anyone. owners: see `ServerGroup`.
    """
    config, host = rollout.server, os.uname().nodename
    if config.host == "auto":
        config = config.model_copy(update={"host": address})
    device_type = config.device if config.device != "auto" else device if isinstance(device, str) else device.type
    if problem := one_host_problem(config, _gpus_of(device_type)):
        raise EngineError(problem)
    dtype = config.dtype if config.dtype != "auto" else DTYPES[precision]
    python = find_python(kind.name, config.python)

    def server(number: int) -> Server:
        gpu = number * config.tensor_parallel_size
        command = kind.command_line(
            python, model_path, config, device=device_type, dtype=dtype, gpu=gpu, weight_version=weight_version
        )
        if key is not None:
            command = kind.guarded(command)
        return Server(
            f"{kind.name} server {number} on {host}",
            command,
            host=config.host,
            address=address if config.host == ALL_INTERFACES else None,
            environment=_merged(kind.environment(config, device=device_type, gpu=gpu), config.env),
            log_path=log_dir / f"{kind.name}-{host}-{number}.log",
            key=key,
        )

    def set_version(url: str) -> None:
        kind.set_version(url, weight_version, key)

    group = ServerGroup(
        [server(i) for i in range(config.num_servers)],
        start_timeout_s=start_timeout_s(config, model_path, weight_version),
        max_restarts=config.max_restarts,
        owners=owners,
        # Where a weight sync brings the weights, it may have done so already.
        on_return=set_version if weight_version != NO_WEIGHTS else None,
    )
    try:
        for url in group.urls:
            if key is not None:
                keys.check_closed(url)
            set_version(url)
    except BaseException:
        group.close()
        raise
    return group


def _gpus_of(device_type: str) -> int:
    if device_type != "cuda":
        return 0
    import torch

    return torch.cuda.device_count()


def _merged(ours: dict[str, str], given: dict[str, str]) -> dict[str, str]:
    """Return our variables overlaid by the given ones; PYTHONPATHs are joined, ours may hold code for the workers."""
    merged = {**ours, **given}
    if "PYTHONPATH" in ours and "PYTHONPATH" in given:
        merged["PYTHONPATH"] = os.pathsep.join((given["PYTHONPATH"], ours["PYTHONPATH"]))
    return merged
