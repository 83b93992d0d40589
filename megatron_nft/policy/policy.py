"""The trained model: chunks, DistributedDataParallel, optimizer and schedule behind four calls."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_nft.config import Config
from megatron_nft.metrics import Max, Mean
from megatron_nft.policy import cpu
from megatron_nft.policy.average import WeightAverage
from megatron_nft.policy.family import ModelSpec
from megatron_nft.policy.model import PolicyModel, build_chunks, uses_transformer_engine
from megatron_nft.policy.one_pass import uses_one_pass
from megatron_nft.policy.optimizer import build_optimizer, describe, optimizer_parts
from megatron_nft.policy.parallel import ParallelLayout
from megatron_nft.policy.precision import in_bf16
from megatron_nft.policy.step import (
    Objective,
    StepInputs,
    check_micro_batches,
    finalize,
    forward_backward,
    forward_logprobs,
)
from megatron_nft.types import PackedBatch


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did, the same on every rank."""

    loss: float  # sum of the trained tokens' losses over all replicas / denominator
    grad_norm: float  # before clipping
    lr: float  # of the update that was made; of the last one where this was skipped
    skipped: bool
    reason: str  # why it was skipped, or ""
    num_tokens: int  # trained tokens over all replicas
    metrics: dict[str, Mean | Max] = field(default_factory=dict)  # of numbers, over all micro-batches and replicas


class Policy:
    """See `create`. Every method is collective: all ranks call it together."""

    def __init__(
        self,
        config: Config,
        spec: ModelSpec,
        layout: ParallelLayout,
        wrapped: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        schedule: OptimizerParamScheduler,
    ) -> None:
        self.config, self.spec, self.layout = config, spec, layout
        self.wrapped, self.optimizer, self.schedule = wrapped, optimizer, schedule
        decay = config.algorithm.average_decay
        self.average = None if decay is None else WeightAverage(wrapped, optimizer, decay)
        self._engine = uses_transformer_engine(config.policy)
        self.on_micro_batch: Callable[[], object] = lambda: None  # called after each forward of a micro-batch

    @classmethod
    def create(cls, config: Config, spec: ModelSpec, layout: ParallelLayout) -> Policy:
        """Build model and optimizer. Weights are NaN until they are loaded into `.chunks`; call
        `reload_master_weights` after loading."""
        chunks = build_chunks(spec, config.policy, layout)
        with cpu.on_cpu():
            wrapped = [_wrap(chunk, config, first=i == 0) for i, chunk in enumerate(chunks)]
            optimizer, schedule = build_optimizer(wrapped, config, num_optimizer_steps(config))
        megatron = chunks[0].config
        megatron.finalize_model_grads_func = finalize
        megatron.grad_scale_func = optimizer.scale_loss
        no_sync = [ddp.no_sync for ddp in wrapped]
        megatron.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        return cls(config, spec, layout, wrapped, optimizer, schedule)

    @property
    def chunks(self) -> list[PolicyModel]:
        """The bare models of this rank, one per virtual pipeline stage."""
        return [ddp.module for ddp in self.wrapped]

    @property
    def pad_multiple(self) -> int:
        """What the tokens of a micro-batch must be a multiple of, for sequence and context parallelism and the FP8
        recipe."""
        return self.config.policy.token_multiple

    @property
    def segment_multiple(self) -> int:
        """What the tokens of each answer in a micro-batch must be a multiple of, for context parallelism."""
        return self.config.policy.segment_multiple

    @property
    def optimizer_kind(self) -> str:
        """Which Adam is in use, for people."""
        return describe(self.optimizer)

    @property
    def lr(self) -> float:
        """Learning rate of the last update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def reload_master_weights(self) -> None:
        """Copy the model's weights into the optimizer's fp32 masters; needed after weights were loaded. A moving
        average starts there."""
        with cpu.on_cpu():
            self.optimizer.reload_model_params()
        if self.average is not None:
            self.average.restart()

    def compute_logprobs(
        self, micro_batches: list[PackedBatch], temperature: float = 1.0, quantized: bool | None = None
    ) -> list[np.ndarray]:
        """log p(labels) at `temperature`, float32 [T] per micro-batch, on every rank of the replica.

        `quantized`: in the FP8 recipe that trains, or in bf16; None as `policy.fp8.logprobs` says.
        """
        if quantized is None:
            quantized = self.config.policy.fp8.logprobs
        found = self._forward(micro_batches, temperature, quantized=quantized, with_entropy=False)
        return [rows[0] for rows in found]

    def compute_average_logprobs(self, micro_batches: list[PackedBatch], temperature: float = 1.0) -> list[np.ndarray]:
        """`compute_logprobs` by the moving average of the weights; afterwards the model has its weights again.

        Only where the algorithm asks for an average (`AlgorithmSettings.average_decay`).
        """
        assert self.average is not None, "no algorithm without average_decay asks for it"
        with self.average.in_model():
            return self.compute_logprobs(micro_batches, temperature)

    def compute_logprobs_and_entropies(
        self, micro_batches: list[PackedBatch], temperature: float = 1.0
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Log-probs as `compute_logprobs` gives them, and the entropies in nats of the distributions from which the
        labels are drawn; both float32 [T] per micro-batch."""
        quantized = self.config.policy.fp8.logprobs
        found = self._forward(micro_batches, temperature, quantized=quantized, with_entropy=True)
        return [rows[0] for rows in found], [rows[1] for rows in found]

    def train_step(
        self, micro_batches: list[PackedBatch], objective: Objective, denominator: float, temperature: float = 1.0
    ) -> StepReport:
        """One optimizer step on this replica's micro-batches: forward, backward, clipping, update.

        The gradient is that of the sum of `objective.loss` over all trained tokens of all replicas, divided by
        `denominator`. Log-probs are those at `temperature`.

        A NaN or Inf in the loss or the gradients skips the update and says so; weights, optimizer state and schedule
        stay as they were. All ranks decide the same, since loss and norm are reduced over all of them.
        """
        if not denominator > 0:
            raise ValueError(f"denominator is {denominator}; it must be above 0")
        check_micro_batches(micro_batches, self.layout, self.pad_multiple)
        with cpu.on_cpu():
            for ddp in self.wrapped:
                ddp.train()
                ddp.zero_grad_buffer()
            self.optimizer.zero_grad()
            inputs = self._inputs(temperature)
            totals = forward_backward(self.wrapped, micro_batches, objective, denominator, inputs, self.layout)
            with torch.no_grad():
                self.optimizer.prepare_grads()
                grad_norm = float(self.optimizer.get_grad_norm())
                reason = _why_skipped(totals.loss_sum, grad_norm)
                if not reason:
                    self.schedule.step(1)
                    _clip_gradients(self.optimizer, grad_norm)
                    self.optimizer.step_with_ready_grads()
                    if self.average is not None:
                        self.average.update()
        return StepReport(
            loss=totals.loss_sum / denominator,
            grad_norm=grad_norm,
            lr=self.lr,
            skipped=bool(reason),
            reason=reason,
            num_tokens=totals.num_tokens,
            metrics=totals.metrics,
        )

    def finish_updates(self) -> None:
        """Make the weights of this rank whole after the last of several `train_step`.

        With `policy.overlap_param_gather` the parts that other data-parallel ranks have updated arrive only during the
        next forward pass; nothing else may read the weights before this.
        """
        if self.config.policy.overlap_param_gather:
            with cpu.on_cpu():
                for ddp in self.wrapped:
                    ddp.start_param_sync(force_sync=True)

    def _forward(
        self, micro_batches: list[PackedBatch], temperature: float, *, quantized: bool, with_entropy: bool
    ) -> list[np.ndarray]:
        """Log-probs and, `with_entropy`, entropies: float32 [1, T] or [2, T] per micro-batch."""
        check_micro_batches(micro_batches, self.layout, self.pad_multiple)
        for ddp in self.wrapped:
            ddp.eval()
        inputs = self._inputs(temperature)
        with cpu.on_cpu(), contextlib.nullcontext() if quantized else in_bf16(self.chunks):
            found = forward_logprobs(self.wrapped, micro_batches, inputs, self.layout, with_entropy=with_entropy)
        return [rows.cpu().numpy() for rows in found]

    def _inputs(self, temperature: float) -> StepInputs:
        return StepInputs(
            temperature=temperature,
            chunk_tokens=self.config.policy.logprob_chunk_tokens,
            vocab_size=self.spec.vocab_size,
            engine=self._engine,
            use_triton=False if self.config.policy.batch_invariant else None,
            one_pass=uses_one_pass(self.config.policy.lm_head, self.layout.device) and self.layout.cp.size == 1,
            on_micro_batch=self.on_micro_batch,
        )


def num_optimizer_steps(config: Config) -> int:
    """Optimizer steps of a whole run."""
    train = config.train
    return train.num_steps * train.num_epochs * (train.questions_per_step // train.questions_per_optimizer_step)


def _why_skipped(loss_sum: float, grad_norm: float) -> str:
    """Why an update must not be made, or ""."""
    if not math.isfinite(loss_sum):
        return f"the loss is {loss_sum}"
    if not math.isfinite(grad_norm):
        return f"the gradient norm is {grad_norm}"
    return ""


def _clip_gradients(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Scale the gradients down to the norm `clip_grad`, if their norm over all ranks, `grad_norm`, is above it."""
    for part in optimizer_parts(optimizer):
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            # with the optimizer on the host, gradients stand in `decoupled_grad`
            decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, grad_norm, use_decoupled_grad=decoupled)


def _wrap(chunk: PolicyModel, config: Config, *, first: bool) -> DistributedDataParallel:
    policy = config.policy
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=policy.use_distributed_optimizer,
        overlap_grad_reduce=policy.overlap_grad_reduce,
        overlap_param_gather=policy.overlap_param_gather,
        check_for_nan_in_grad=False,  # it raises; `train_step` skips the step
    )
    return DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=not first)
