"""The weight sync that the settings and the engine ask for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from megatron_nft.engines.open import engine_kind
from megatron_nft.weights.names import hf_shapes
from megatron_nft.weights.sync import WeightSync
from megatron_nft.weights.transport import Ledger
from megatron_nft.weights.transports.disk import DiskTransport
from megatron_nft.weights.transports.distributed import DistributedTransport
from megatron_nft.weights.transports.servers import ServerTransport
from megatron_nft.weights.transports.tensor import TensorTransport

if TYPE_CHECKING:
    from megatron_nft.config import Config
    from megatron_nft.engines.engine import Engine
    from megatron_nft.policy.family import ModelSpec
    from megatron_nft.policy.parallel import ParallelLayout

TRANSPORTS: dict[str, type[ServerTransport]] = {
    "tensor": TensorTransport,
    "distributed": DistributedTransport,
    "disk": DiskTransport,
}


def open_weight_sync(config: Config, spec: ModelSpec, layout: ParallelLayout, engine: Engine) -> WeightSync:
    """This rank's end of the sync into `engine`. Collective.

    ValueError where updates of such a model come out wrong in this engine; WeightSyncError where servers do not answer
    or differ in their settings.
    """
    engine_kind(config.rollout.engine).check_updates(config.rollout, spec)
    ledger = Ledger(hf_shapes(spec))
    transport = engine.open_transport(config, spec, layout, ledger)
    return WeightSync(config, spec, layout, transport, ledger)


def server_transport(name: str, urls: Sequence[str]) -> type[ServerTransport]:
    """The transport of `sync.transport` into servers at `urls`.

    `auto`: shared memory where every server is on this machine (ours, or at a loopback address), else a group.
    """
    if name == "auto":
        local = {"127.0.0.1", "localhost", "::1", os.uname().nodename}
        name = "tensor" if all(urlsplit(url).hostname in local for url in urls) else "distributed"
    return TRANSPORTS[name]
