"""Settings: typed sections, YAML files, dotted overrides. Imports no torch."""

from megatron_nft.config.load import ConfigError, dump_config, load_config
from megatron_nft.config.policy import FP8_ALIGNMENT, Fp8Config, ModelConfig, OptimizerConfig, PolicyConfig
from megatron_nft.config.rollout import DataConfig, RolloutConfig, ServerConfig, VerifyConfig
from megatron_nft.config.settings import Config
from megatron_nft.config.training import (
    CheckpointConfig,
    EvalConfig,
    MetricsConfig,
    SyncConfig,
    TrainConfig,
)

__all__ = [
    "FP8_ALIGNMENT",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "Fp8Config",
    "MetricsConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PolicyConfig",
    "RolloutConfig",
    "ServerConfig",
    "SyncConfig",
    "TrainConfig",
    "VerifyConfig",
    "dump_config",
    "load_config",
]
