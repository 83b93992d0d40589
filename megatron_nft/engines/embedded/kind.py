"""The embedded engine, as open.py's table finds it."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_nft.distributed import gather_objects
from megatron_nft.engines.embedded.engine import EmbeddedEngine
from megatron_nft.engines.engine import DTYPES, Engine, OpenOptions

if TYPE_CHECKING:
    from megatron_nft.config import RolloutConfig, ServerConfig
    from megatron_nft.engines.kind import EngineKind
    from megatron_nft.policy.family import ModelSpec


class EmbeddedKind:
    """See `kind.EngineKind`."""

    def open(self, model_path: Path, rollout: RolloutConfig, options: OpenOptions, /) -> Engine:
        """Every rank holds a copy of the weights; what the ranks of one host hold together must fit its memory."""
        layout, host = options.layout, os.uname().nodename
        hosts = gather_objects(host, layout.world_gloo if layout else None)
        return EmbeddedEngine.create(
            model_path,
            dtype=DTYPES[options.precision],
            device=layout.device if layout else "cpu",
            batch_tokens=rollout.embedded_batch_tokens,
            num_copies=hosts.count(host),
            load_weights=options.load_weights,
        )

    def check_updates(self, rollout: RolloutConfig, spec: ModelSpec, engine: Engine, /) -> None:
        """Do nothing: updates of every model come out right."""

    def version(self, model_path: Path, server: ServerConfig, /) -> str:
        """Return the version of transformers, which makes the answers."""
        return f"transformers {version('transformers')}"


KIND: EngineKind = EmbeddedKind()
