"""The size of a step, and what happens around it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_nft.section import NonNegativeInt, PositiveFloat, PositiveInt, Section


class StallTimeouts(Section):
    """Seconds that single phases may go without progress, in place of `train.stall_timeout_s`; null takes that."""

    start: PositiveFloat | None = 3600.0
    """From the start of the ranks to the first step: models are read and servers started."""
    generate: PositiveFloat | None = None
    """Generation. A server that works on answers is progress; `rollout.server.stall_timeout_s` finds one that hangs,
    and `rollout.server.start_timeout_s` bounds the wait for one that is started again."""
    exchange: PositiveFloat | None = None
    """Samples on their way to the ranks that train them, as a whole."""
    logprobs: PositiveFloat | None = None
    """The trainer's log-probs before the update; a micro-batch is progress."""
    write: PositiveFloat | None = None
    """Rollout files, as a whole."""
    train: PositiveFloat | None = None
    """The optimizer steps; a micro-batch is progress."""
    sync: PositiveFloat | None = None
    """The weight sync, as a whole."""
    checkpoint: PositiveFloat | None = 3600.0
    """Writing a checkpoint, as a whole; the wait for one that is written beside the training too."""
    evaluate: PositiveFloat | None = None
    """Held-out questions, as in generation."""
    export: PositiveFloat | None = 3600.0
    """Writing the trained model, as a whole."""

    def given(self) -> dict[str, float]:
        """Phase -> its own seconds."""
        own = {
            "start": self.start,
            "generate": self.generate,
            "exchange": self.exchange,
            "logprobs": self.logprobs,
            "write": self.write,
            "train": self.train,
            "sync": self.sync,
            "checkpoint": self.checkpoint,
            "checkpoint_wait": self.checkpoint,
            "evaluate": self.evaluate,
            "evaluate_wait": self.evaluate,
            "export": self.export,
        }
        return {phase: seconds for phase, seconds in own.items() if seconds is not None}


class TrainConfig(Section):
    """The size of a step."""

    num_steps: PositiveInt = 100
    """Training steps of the run. A step generates answers, trains on them and syncs the weights."""
    questions_per_step: PositiveInt = 512
    """Questions trained per step, each with all of its answers (a group)."""
    questions_per_optimizer_step: PositiveInt = 32
    """Questions per optimizer update; must divide `questions_per_step`. With both equal, one epoch and
    rollout.max_staleness=0, training is strictly on-policy."""
    num_epochs: PositiveInt = 1
    """Passes over the groups of each step."""
    max_skipped_steps: NonNegativeInt = 3
    """Optimizer updates in a row that may be skipped because the gradient holds a NaN or Inf; one more ends the run."""
    stall_timeout_s: PositiveFloat = 900.0
    """Seconds that a phase may go without progress. Then the stacks of all ranks are written to run_dir/stacks, and the
    run ends with a line that names the rank for which the others wait. Raise it where a phase really takes longer."""
    stall_timeout_by_phase: StallTimeouts = StallTimeouts()
    """The same for single phases."""
    heartbeat_s: PositiveFloat = 5.0
    """Seconds between two signs of life of a rank: in run_dir/ranks, and over the network in a run on several hosts. A
    thread of its own gives them, whatever the rank is doing."""
    heartbeat_timeout_s: PositiveFloat = 60.0
    """Seconds without a sign of life of a rank after which the others take it for lost, with its host, and end with a
    line that names host, rank and phase. It has nothing to do with the length of a phase: raise it only where processes
    are stopped for so long (a debugger, a host that is paused)."""
    collective_timeout_s: PositiveFloat = 7200.0
    """Seconds that a rank waits in a collective for the others, if they give signs of life. Then it ends and names the
    phase and who is late. Ranks that generate meet about once a second, so that it need not be longer than some
    generate more than others."""

    profile: Literal["torch", "nsys", "memory"] | None = None
    """Profile `profile_steps` on `profile_ranks`: torch writes traces for Perfetto, nsys marks what Nsight Systems
    records, memory writes snapshots of the GPU's allocations. docs/profiling.md says how each is read; null: none."""
    profile_steps: list[PositiveInt] = Field(default=[3])
    """Training steps that are profiled."""
    profile_ranks: list[NonNegativeInt] = Field(default=[0])
    """Ranks that are profiled."""

    @model_validator(mode="after")
    def _beats_before_it_is_lost(self) -> TrainConfig:
        if self.heartbeat_timeout_s < 4 * self.heartbeat_s:
            raise ValueError(
                f"heartbeat_timeout_s ({self.heartbeat_timeout_s:g}) must be at least four times heartbeat_s "
                f"({self.heartbeat_s:g}): one late sign of life is no loss"
            )
        return self

    @model_validator(mode="after")
    def _divides(self) -> TrainConfig:
        if self.questions_per_step % self.questions_per_optimizer_step:
            raise ValueError(
                f"questions_per_optimizer_step ({self.questions_per_optimizer_step}) must divide "
                f"questions_per_step ({self.questions_per_step})"
            )
        return self


class SyncConfig(Section):
    """How weights get from the trainer into the engines."""

    transport: Literal["auto", "tensor", "distributed", "disk"] = "auto"
    """tensor: shared memory, or CUDA IPC on a GPU, for servers on the trainer's hosts, each from the ranks of its own;
    distributed: gloo or NCCL broadcast to servers on other machines; disk: files in run_dir that the servers load. auto
    takes `tensor` where every server is on a trainer's host, else `distributed`. The embedded engine copies in the
    process, which `auto` and `tensor` both mean."""
    bucket_bytes: PositiveInt = 512 << 20
    """Bytes of weights that travel together. A leader of a sync, and with `tensor` every rank that shares a GPU with an
    engine, holds two buckets of this size beside its own weights; make it smaller where memory is short."""
    in_flight: Literal["finish", "abort", "continue"] | None = None
    """What happens to requests under way when a sync begins: wait for them (not with rollout.mode=overlapped, where
    some always are), abort them and ask again under the new weights, or let them go on under the new weights. null:
    abort with rollout.mode=overlapped, else finish."""
    probe_tolerance: PositiveFloat | None = None
    """Largest difference between the engine's and the trainer's log-probs (nats per token) of the probe after a sync;
    a larger one ends the run. null: 1e-3 in fp32, 0.5 in bf16, 2 where the engine quantizes to FP8."""
    verify_checksums: bool = True
    """Compare checksums of every tensor after each sync, where the engine offers them."""
    timeout_s: PositiveFloat = 600.0
    """Seconds that one call to an engine may take during a sync."""

    def in_flight_for(self, mode: str) -> str:
        """`in_flight`, or what fits the mode of the rollouts (rollout.mode) where it is not set."""
        return self.in_flight or ("abort" if mode == "overlapped" else "finish")


class CheckpointConfig(Section):
    """Saving and resuming."""

    every_steps: PositiveInt = 20
    """Training steps between two checkpoints. The last step and a stop signal save as well."""
    keep: PositiveInt = 2
    """Complete checkpoints that stay on disk; older ones are deleted once a newer one is complete."""
    asynchronous: bool = True
    """Write in the background, from copies in host memory, while the next step goes on. A checkpoint counts once all of
    it is on disk, and older ones stay until then: a run that is killed before goes on from the one before. false stops
    the step until the checkpoint is whole, and needs no memory for copies (14 bytes per parameter in bf16, 16 in fp32,
    divided by all ranks)."""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on from the newest complete checkpoint of run_dir; never refuses a run_dir that has one."""
    export_hf: bool = True
    """Write the final weights to run_dir/hf in Hugging Face format."""


class EvalConfig(Section):
    """Held-out questions during training."""

    data: list[Path] = Field(default=[])
    """Files of held-out questions, in the same formats as data.train. Empty: no evaluation."""
    every_steps: NonNegativeInt = 0
    """Training steps between two evaluations; 0 evaluates only before the first and after the last step. With
    rollout.mode=overlapped training goes on meanwhile (docs/nft.md)."""
    samples: PositiveInt = 1
    """Answers per question; accuracy is their mean."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Sampling temperature; 0 is greedy decoding."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: the probability mass that tokens are drawn from. 1 draws from all of it."""
    max_response_tokens: PositiveInt | None = None
    """Tokens after which an answer is cut off; null takes rollout.max_response_tokens."""


class MetricsConfig(Section):
    """Where metrics go, besides run_dir/metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard event files to run_dir/tensorboard."""
    wandb_project: str | None = None
    """Project on Weights & Biases to log to as well (extra `wandb`); null does not log there."""
    entropy_every_steps: NonNegativeInt = 1
    """Training steps from one `policy/entropy` to the next; 0 turns it off. It is the mean entropy, in nats, of the
    policy's distribution over the tokens of the answers that the step generated and kept, before the first update and
    at `rollout.temperature`. It is computed with the behaviour log-probs, changes no weight, and costs about a tenth of
    the output layer's time in that pass for a vocabulary of 152k (on a CPU), and nothing measurable for a small one."""
