"""The weight sync that the settings and the engine ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_nft.engines.open import engine_kind
from megatron_nft.weights.names import hf_shapes
from megatron_nft.weights.sync import WeightSync
from megatron_nft.weights.transport import Ledger

if TYPE_CHECKING:
    from megatron_nft.config import Config
    from megatron_nft.engines.engine import Engine
    from megatron_nft.policy.family import ModelSpec
    from megatron_nft.policy.parallel import ParallelLayout


def open_weight_sync(config: Config, spec: ModelSpec, layout: ParallelLayout, engine: Engine) -> WeightSync:
    """This rank's end of the sync into `engine`. Collective.

    ValueError where updates of such a model come out wrong in this engine; WeightSyncError where servers do not answer
    or differ in their settings.
    """
    engine_kind(config.rollout.engine).check_updates(config.rollout, spec, engine)
    ledger = Ledger(hf_shapes(spec))
    transport = engine.open_transport(config, spec, layout, ledger)
    return WeightSync(config, spec, layout, transport, ledger)
