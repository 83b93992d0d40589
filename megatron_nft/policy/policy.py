"""The trained model: chunks, DistributedDataParallel, optimizer and schedule behind four calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_nft.config import Config
from megatron_nft.policy import cpu
from megatron_nft.policy.family import ModelSpec
from megatron_nft.policy.model import PolicyModel, build_chunks, uses_transformer_engine
from megatron_nft.policy.optimizer import build_optimizer, describe
from megatron_nft.policy.parallel import ParallelLayout
from megatron_nft.policy.precision import in_bf16
from megatron_nft.policy.step import Loss, StepInputs, check_micro_batches, finalize, forward_backward, forward_logprobs
from megatron_nft.policy.update import update
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
    metrics: dict[str, float] = field(default_factory=dict)  # sums (max_...: maxima) over micro-batches and replicas


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
        """What the tokens of a micro-batch must be a multiple of, for sequence parallelism and the FP8 recipe."""
        return self.config.policy.token_multiple

    def round_num_micro_batches(self, count: int) -> int:
        """The next number of micro-batches, at least one, that the pipeline schedule can run."""
        multiple = self.layout.pp_size if self.layout.vpp_size else 1
        return max(1, -(-count // multiple)) * multiple

    @property
    def optimizer_kind(self) -> str:
        """Which Adam is in use, for people."""
        return describe(self.optimizer)

    @property
    def lr(self) -> float:
        """Learning rate of the last update."""
        return self.optimizer.param_groups[0]["lr"]

    @property
    def num_updates(self) -> int:
        """Optimizer steps made, skipped ones not counted."""
        return self.schedule.num_steps

    def reload_master_weights(self) -> None:
        """Copy the model's weights into the optimizer's fp32 masters; needed after weights were loaded."""
        with cpu.on_cpu():
            self.optimizer.reload_model_params()

    def broadcast_params(self) -> None:
        """Give every replica the weights of data-parallel rank 0."""
        with cpu.on_cpu():
            for ddp in self.wrapped:
                ddp.broadcast_params()

    def compute_logprobs(
        self, micro_batches: list[PackedBatch], temperature: float = 1.0, quantized: bool | None = None
    ) -> list[np.ndarray]:
        """log p(labels) at `temperature`, float32 [T] per micro-batch, on every rank of the replica.

        `quantized`: in the FP8 recipe that trains, or in bf16; None as `policy.fp8.logprobs` says.
        """
        check_micro_batches(micro_batches, self.layout, self.pad_multiple)
        for ddp in self.wrapped:
            ddp.eval()
        if quantized is None:
            quantized = self.config.policy.fp8.logprobs
        with cpu.on_cpu(), contextlib.nullcontext() if quantized else in_bf16(self.chunks):
            found = forward_logprobs(self.wrapped, micro_batches, self._inputs(temperature), self.layout)
        return [logprobs.cpu().numpy() for logprobs in found]

    def train_step(
        self, micro_batches: list[PackedBatch], loss: Loss, denominator: float, temperature: float = 1.0
    ) -> StepReport:
        """One optimizer step on this replica's micro-batches. The gradient is that of the sum of `loss` over all
        trained tokens of all replicas, divided by `denominator`. Log-probs are those at `temperature`.

        A NaN or Inf in the loss or the gradients skips the update and says so.
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
            totals = forward_backward(self.wrapped, micro_batches, loss, denominator, inputs, self.layout)
            grad_norm, reason = update(self.optimizer, self.schedule, totals.loss_sum)
        return StepReport(
            loss=totals.loss_sum / denominator,
            grad_norm=grad_norm,
            lr=self.lr,
            skipped=bool(reason),
            reason=reason,
            num_tokens=totals.num_tokens,
            metrics=totals.metrics,
        )

    def _inputs(self, temperature: float) -> StepInputs:
        return StepInputs(
            temperature=temperature,
            chunk_tokens=self.config.policy.logprob_chunk_tokens,
            vocab_size=self.spec.vocab_size,
            engine=self._engine,
            on_micro_batch=self.on_micro_batch,
        )


def num_optimizer_steps(config: Config) -> int:
    """Optimizer steps of a whole run."""
    train = config.train
    return train.num_steps * train.num_epochs * (train.questions_per_step // train.questions_per_optimizer_step)


def _wrap(chunk: PolicyModel, config: Config, *, first: bool) -> DistributedDataParallel:
    policy = config.policy
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=policy.use_distributed_optimizer,
        overlap_grad_reduce=policy.overlap_grad_reduce,
        check_for_nan_in_grad=False,  # it raises; policy/update.py skips the step
    )
    return DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=not first)
