"""Runs the engines of one node for a trainer on other nodes, until told to stop.

    python -m megatron_nft.engines.serve --registry FOLDER --config FILE … [key=value …]

Starts `rollout.server.num_servers` servers, announces them in FOLDER (discovery.py), starts dead ones again and those
that ranks say to hang (owners.py), and ends them all when FOLDER/stop appears or on SIGTERM. With
`rollout.server.host=auto` they listen on the node's address (addresses.node_address), or on loopback where nothing
gives one. Beyond loopback they ask for the key in FOLDER/key, which the first node makes. Exit status: 0 told to stop,
1 servers that do not come up or died too often.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path

from megatron_nft.config import Config, ConfigError, load_config
from megatron_nft.engines import keys
from megatron_nft.engines.addresses import LOOPBACK, is_local, node_address
from megatron_nft.engines.discovery import register
from megatron_nft.engines.engine import NO_WEIGHTS, EngineError
from megatron_nft.engines.http import HttpEngineKind
from megatron_nft.engines.open import engine_kind
from megatron_nft.engines.owners import Owners
from megatron_nft.engines.server import ServerGroup
from megatron_nft.engines.start import start_servers

POLL_S = 1.0


def start(config: Config, node: str, registry: Path) -> ServerGroup:
    """Start the servers of this node and wait until all are healthy; the trainer's first sync brings the weights."""
    import torch

    kind = engine_kind(config.rollout.engine)
    if not isinstance(kind, HttpEngineKind):
        raise EngineError(f"rollout.engine={config.rollout.engine} has no servers; engine nodes need sglang or vllm")
    address, host = node_address(), config.rollout.server.host
    if host == "auto":
        host = address or LOOPBACK
    server = config.rollout.server.model_copy(update={"host": host})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and config.sync.transport != "disk":
        server = kind.for_other_hosts(server)
    return start_servers(
        kind,
        config.model.path,
        config.rollout.model_copy(update={"server": server}),
        precision=config.policy.precision,
        device=device,
        log_dir=config.run_dir / "engines" / node,
        weight_version=NO_WEIGHTS,
        address=address or os.uname().nodename,
        key=None if is_local(host) else keys.common_key(registry / keys.FILE),
        owners=Owners(registry),
    )


def serve(config: Config, registry: Path, node: str, stop: threading.Event) -> int:
    """Run the engines until `stop` is set or the registry holds a file `stop`; returns the exit status."""
    group = start(config, node, registry)
    announcement = register(registry, node, group.urls)
    print(f"engines of {node}: {', '.join(group.urls)}", flush=True)
    try:
        while not stop.wait(POLL_S) and not (registry / "stop").exists():
            if group.given_up:
                raise EngineError(f"all servers of {node} died too often:\n{group.failures()}")
    finally:
        announcement.unlink(missing_ok=True)
        group.close()
    return 0


def main() -> int:
    """Read the command line, run the engines and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--registry", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--config", action="append", required=True, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    stop = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())
    node = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    try:
        return serve(load_config(args.config, args.overrides), args.registry, node, stop)
    except (ConfigError, EngineError, OSError) as e:
        print(f"megatron-nft: engines on {node}: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
