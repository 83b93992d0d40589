"""The size of a step, and what happens around it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_nft.section import NonNegativeInt, PositiveFloat, PositiveInt, Section


class TrainConfig(Section):
    """The size of a step."""

    num_steps: PositiveInt = 100
    """Training steps (rollout batches)."""
    questions_per_step: PositiveInt = 512
    """Question groups trained per step."""
    questions_per_optimizer_step: PositiveInt = 32
    num_epochs: PositiveInt = 1
    """Passes over each step's groups."""
    max_skipped_steps: NonNegativeInt = 3
    """Optimizer steps in a row that may be skipped for a NaN or Inf; one more ends the run."""
    stall_timeout_s: PositiveFloat = 3600.0
    """A phase without progress for this long writes every rank's stacks and ends the run."""

    @model_validator(mode="after")
    def _divides(self) -> TrainConfig:
        if self.questions_per_step % self.questions_per_optimizer_step:
            raise ValueError(
                f"questions_per_optimizer_step ({self.questions_per_optimizer_step}) must divide "
                f"questions_per_step ({self.questions_per_step})"
            )
        return self


class SyncConfig(Section):
    """Weights from the trainer into the engines."""

    transport: Literal["auto", "tensor", "distributed", "disk"] = "auto"
    """auto: in-process for `embedded`, else `tensor` (shared memory, CUDA IPC) for engines on this machine."""
    bucket_bytes: PositiveInt = 512 << 20
    in_flight: Literal["finish", "abort", "continue"] = "finish"
    """Requests under way at a sync: wait for them, abort and resubmit, or go on under the new weights."""
    probe_tolerance: PositiveFloat | None = None
    """Largest |log-prob difference| of the probe after a sync; None: 1e-3 in fp32, 0.5 in bf16, 2 with FP8 rollouts."""
    verify_checksums: bool = True
    """Compare per-tensor checksums of trainer and engine where the engine offers them."""
    timeout_s: PositiveFloat = 600.0


class CheckpointConfig(Section):
    """Saving and resuming."""

    every_steps: PositiveInt = 20
    keep: PositiveInt = 2
    """Complete checkpoints that stay on disk."""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on from the newest complete checkpoint of run_dir; never refuses a run_dir that has one."""
    save_optimizer: bool = True
    export_hf: bool = True
    """Write the final weights as run_dir/hf."""


class EvalConfig(Section):
    """Held-out questions during training."""

    data: list[Path] = Field(default=[])
    every_steps: NonNegativeInt = 0
    """0: only before the first and after the last step, if `data` is given."""
    samples: PositiveInt = 1
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0 means greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_response_tokens: PositiveInt | None = None
    """None: rollout.max_response_tokens."""


class MetricsConfig(Section):
    """Where figures go, besides run_dir/metrics.jsonl."""

    tensorboard: bool = True
    wandb_project: str | None = None
    """Set to log to Weights & Biases as well (extra `wandb`)."""
