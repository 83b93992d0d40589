"""All settings of a run, and what must hold between sections. `megatron_nft.config` is where to import them from.

Every field has a default or is required, and a line that says what it does. Nothing here imports torch:
`megatron-nft --help` and `--dry-run` stay quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, SerializeAsAny, model_validator

from megatron_nft.algorithms import AlgorithmSettings, read_settings
from megatron_nft.algorithms.nft import NFTSettings
from megatron_nft.config.policy import ModelConfig, OptimizerConfig, PolicyConfig
from megatron_nft.config.rollout import DataConfig, RolloutConfig, VerifyConfig
from megatron_nft.config.training import (
    CheckpointConfig,
    EvalConfig,
    MetricsConfig,
    SyncConfig,
    TrainConfig,
)
from megatron_nft.section import NonNegativeInt, PositiveInt, Section


def _read_algorithm(value: object) -> object:
    """A mapping as the settings of the algorithm that it names; pydantic refuses anything else."""
    return read_settings(value) if isinstance(value, Mapping) else value


class Config(Section):
    """All settings of `megatron-nft train`."""

    run_dir: Path
    """Everything the run writes."""
    seed: NonNegativeInt = 0
    num_processes: PositiveInt = 1
    """Local ranks to start when not under torchrun or Slurm."""
    model: ModelConfig
    policy: PolicyConfig = PolicyConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    algorithm: Annotated[SerializeAsAny[AlgorithmSettings], BeforeValidator(_read_algorithm)] = NFTSettings()
    """One flat section; which keys it has depends on `algorithm.name` (see `megatron_nft.algorithms`)."""
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    verify: VerifyConfig = VerifyConfig()
    train: TrainConfig = TrainConfig()
    sync: SyncConfig = SyncConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    metrics: MetricsConfig = MetricsConfig()

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        longest = self.data.max_prompt_tokens + self.rollout.max_response_tokens
        multiple = self.policy.token_multiple
        if longest > self.policy.micro_batch_tokens // multiple * multiple:
            padded = f", padded to a multiple of {multiple}" if multiple > 1 else ""
            raise ValueError(
                f"policy.micro_batch_tokens ({self.policy.micro_batch_tokens}) must hold the longest answer: "
                f"data.max_prompt_tokens ({self.data.max_prompt_tokens}) + "
                f"rollout.max_response_tokens ({self.rollout.max_response_tokens}) = {longest}{padded}"
            )
        self.algorithm.check_response_limit(self.rollout.max_response_tokens)
        if self.rollout.engine == "embedded" and self.sync.transport not in ("auto", "tensor"):
            raise ValueError(f"sync.transport={self.sync.transport} needs rollout.engine sglang or vllm, not embedded")
        return self

    def check_world_size(self, world_size: int) -> int:
        """Data-parallel size for `world_size` ranks. ValueError where the layout does not divide it."""
        tp, pp = self.policy.tensor_model_parallel_size, self.policy.pipeline_model_parallel_size
        if world_size % (tp * pp):
            raise ValueError(
                f"{world_size} processes cannot be divided into tensor_model_parallel_size ({tp}) x "
                f"pipeline_model_parallel_size ({pp}) = {tp * pp}; set num_processes to a multiple of {tp * pp}"
            )
        dp = world_size // (tp * pp)
        ep = self.policy.expert_model_parallel_size
        if (dp * tp) % ep:
            raise ValueError(f"expert_model_parallel_size ({ep}) must divide data x tensor parallel size ({dp * tp})")
        return dp
