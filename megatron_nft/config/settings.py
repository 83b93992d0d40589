"""All settings of a run, and what must hold between sections. `megatron_nft.config` is where to import them from.

Every field has a default or is required, and a line that says what it does. Nothing here imports torch:
`megatron-nft --help` and `--dry-run` stay quick.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import model_validator

from megatron_nft.config.policy import ModelConfig, OptimizerConfig, PolicyConfig
from megatron_nft.config.rollout import DataConfig, RolloutConfig, VerifyConfig
from megatron_nft.config.training import (
    AlgorithmConfig,
    CheckpointConfig,
    EvalConfig,
    MetricsConfig,
    SyncConfig,
    TrainConfig,
)
from megatron_nft.section import NonNegativeInt, PositiveInt, Section


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
    algorithm: AlgorithmConfig = AlgorithmConfig()
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
        if self.algorithm.overlong_buffer_tokens > self.rollout.max_response_tokens:
            raise ValueError(
                f"algorithm.overlong_buffer_tokens ({self.algorithm.overlong_buffer_tokens}) must be at most "
                f"rollout.max_response_tokens ({self.rollout.max_response_tokens})"
            )
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
