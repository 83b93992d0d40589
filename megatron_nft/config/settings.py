"""All settings of a run, and what must hold between sections. `megatron_nft.config` is where to import them from.

Every field has a default or is required, and a text below it that says what it does; docs/settings.md is made of
these texts. Nothing here imports torch: `megatron-nft --help` and `--dry-run` stay quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, SerializeAsAny, model_validator

from megatron_nft.algorithms import AlgorithmSettings, open_algorithm, read_settings
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


def _at(values: Mapping[str, object], key: str) -> Mapping[str, object]:
    """A section of settings as they were given; nothing where it is no mapping, which pydantic refuses later."""
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}


class Config(Section):
    """All settings of `megatron-nft train`."""

    run_dir: Path
    """Folder that everything the run writes goes to. A run that finds a checkpoint in it goes on from there."""
    seed: NonNegativeInt = 0
    """Seed of the order of the questions, of the embedded engine's sampling (servers have random numbers of their own)
    and of the order of training."""
    num_processes: PositiveInt = 1
    """Ranks to start on this machine, one per GPU; not used under torchrun or Slurm, which start their own."""
    model: ModelConfig
    """The model that is trained."""
    policy: PolicyConfig = PolicyConfig()
    """The trained model on Megatron-Core: how it is laid out and computed. The names are megatron-core's own."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedule."""
    algorithm: Annotated[SerializeAsAny[AlgorithmSettings], BeforeValidator(_read_algorithm)] = NFTSettings()
    """The loss: one flat section, whose further keys depend on `algorithm.name`. An algorithm of your own has keys of
    its own."""
    data: DataConfig
    """Questions to train on."""
    rollout: RolloutConfig = RolloutConfig()
    """Generation of answers."""
    verify: VerifyConfig = VerifyConfig()
    """Grading of answers, in worker processes that can be killed."""
    train: TrainConfig = TrainConfig()
    """The size of a step."""
    sync: SyncConfig = SyncConfig()
    """How weights get from the trainer into the engines."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
    eval: EvalConfig = EvalConfig()
    """Held-out questions during training."""
    metrics: MetricsConfig = MetricsConfig()
    """Where metrics go, besides run_dir/metrics.jsonl."""

    @model_validator(mode="before")
    @classmethod
    def _engine_is_batch_invariant(cls, values: object) -> object:
        """`policy.batch_invariant` is for both sides: it sets `rollout.server.deterministic`, unless that is given."""
        if not isinstance(values, dict) or not _at(values, "policy").get("batch_invariant"):
            return values
        if not isinstance(values.get("rollout", {}), Mapping):
            return values  # a section that was made before, or nonsense
        rollout = _at(values, "rollout")
        server = {"deterministic": True, **_at(rollout, "server")}
        return {**values, "rollout": {**rollout, "server": server}}

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
        if self.algorithm.average_decay is not None:
            self.policy.check_average()
        self.algorithm.check_response_limit(self.rollout.max_response_tokens)
        if self.policy.lm_head == "one_pass":
            self._check_one_pass()
        if self.policy.batch_invariant and not (self.rollout.uses_servers and self.rollout.server.deterministic):
            raise ValueError(
                "policy.batch_invariant=true is for trainer and engine: it needs rollout.engine=sglang or vllm with "
                "rollout.server.deterministic=true, which it sets by itself, not rollout.engine="
                f"{self.rollout.engine} with {str(self.rollout.server.deterministic).lower()}"
            )
        if self.rollout.mode == "overlapped" and self.sync.in_flight == "finish":
            raise ValueError(
                "sync.in_flight=finish with rollout.mode=overlapped: answers are always under way there, so a sync "
                "would wait for the longest and lose its servers after sync.timeout_s; set sync.in_flight to abort or "
                "continue, or leave it out"
            )
        if not self.rollout.uses_servers and self.sync.transport not in ("auto", "tensor"):
            raise ValueError(f"sync.transport={self.sync.transport} needs rollout.engine sglang or vllm, not embedded")
        return self

    def _check_one_pass(self) -> None:
        """ValueError for a loss that policy.lm_head=one_pass cannot evaluate."""
        if self.policy.context_parallel_size > 1:
            raise ValueError(
                "policy.lm_head=one_pass evaluates the loss on a rank's own tokens, and with context_parallel_size="
                f"{self.policy.context_parallel_size} no rank has whole answers; use two_pass or auto"
            )
        if not open_algorithm(self.algorithm, max_response_tokens=self.rollout.max_response_tokens).per_token:
            raise ValueError(
                f"policy.lm_head=one_pass evaluates the loss on some tokens at a time, and that of algorithm.name="
                f"{self.algorithm.name} with these settings does not declare that it is per token; use two_pass or auto"
            )
