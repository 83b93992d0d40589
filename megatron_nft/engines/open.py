"""The engine that the settings ask for, on every rank."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_nft.config.engines import ENGINES
from megatron_nft.engines.engine import Engine, EngineError, OpenOptions, Ranks

if TYPE_CHECKING:
    from megatron_nft.config import Config, RolloutConfig
    from megatron_nft.engines.kind import EngineKind


def engine_kind(name: str) -> EngineKind:
    """The record of an engine, imported when it is asked for."""
    kind: EngineKind = importlib.import_module(ENGINES[name]).KIND
    return kind


def create_engine(config: Config, layout: Ranks) -> Engine:
    """This rank's engine for training. Collective. The first weight sync brings the weights."""
    return open_engine(
        config.model.path,
        config.rollout,
        precision=config.policy.precision,
        log_dir=config.run_dir / "engines",
        layout=layout,
        load_weights=False,
        # A request that is held during a sync was asked for under the old weights.
        allow_version_change=config.sync.in_flight_for(config.rollout.mode) != "finish",
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

    The other arguments are explained at `engine.OpenOptions`.
    """
    if load_weights and not (rollout.server.urls or rollout.server.registry):
        _refuse_wrong_tensors(Path(model_path))
    options = OpenOptions(precision, log_dir, layout, load_weights, allow_version_change)
    return engine_kind(rollout.engine).open(model_path, rollout, options)


def _refuse_wrong_tensors(model_path: Path) -> None:
    """EngineError where the folder's tensors are not those that its config promises: engines would fill the gaps with
    random numbers. What is not a folder with config and weights at all, the engine refuses itself."""
    if not (model_path / "config.json").is_file() or not any(model_path.glob("*.safetensors")):
        return
    from megatron_nft.weights.hf_check import check_model_folder

    try:
        check_model_folder(model_path)
    except ValueError as error:
        raise EngineError(str(error)) from None
