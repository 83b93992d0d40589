"""Forward and backward over micro-batches. All rescaling of losses and gradients stands in this file.

The gradient that the optimizer sees is, whatever the data, tensor, context, pipeline, sequence or virtual-pipeline
layout, the packing and the split into micro-batches,

    d/dtheta  sum over replicas, micro-batches and tokens with loss_mask 1 of weight * per-token loss  /  denominator

Megatron would divide by micro-batches, tokens and data-parallel ranks at several places. With
`calculate_per_token_loss` it only ever sums: the schedule does not touch the loss, DistributedDataParallel adds up
over data- and context-parallel ranks, and `finalize` hands Megatron no token count to divide by. The one division is
`_loss_of`. Context-parallel ranks evaluate the loss of the whole micro-batch, alike, and each has the gradient of its
own tokens' log-probs (policy/context_parallel.py). Gradient clipping comes after, in `Policy.train_step`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_nft.metrics import Max, Mean
from megatron_nft.policy.context_parallel import TokenSplit
from megatron_nft.policy.logprobs import linear_logprobs
from megatron_nft.policy.model import PolicyModel, packed_params, unwrap
from megatron_nft.policy.one_pass import linear_loss
from megatron_nft.policy.parallel import ParallelLayout
from megatron_nft.types import PackedBatch


class Objective(Protocol):
    """What a step minimizes and logs; every `megatron_nft.algorithms.Algorithm` is one."""

    @property
    def per_token(self) -> bool:
        """Whether `loss` may be asked about some tokens of a micro-batch at a time (`PackedBatch.tokens_of`)."""

    def loss(self, logprobs: Tensor, batch: PackedBatch) -> Tensor:
        """Log-probs fp32 [T] -> loss of each token [T], before its weight. Values outside loss_mask are ignored."""

    def metrics(self, logprobs: Tensor, loss: Tensor, batch: PackedBatch) -> dict[str, Mean | Max]:
        """Called without gradients with the log-probs and the weighted loss [T], 0 outside loss_mask. Every call must
        return the same names, each of the same kind."""


@dataclass(frozen=True)
class StepInputs:
    """What a forward pass needs besides the batch."""

    temperature: float
    chunk_tokens: int
    vocab_size: int
    engine: bool  # Transformer Engine layers
    one_pass: bool  # policy/one_pass.py, where the objective is per token
    use_triton: bool | None  # for the log-probs; None: where it can be used
    on_micro_batch: Callable[[], object]  # called after each forward of a micro-batch by this rank's first chunk


@dataclass(frozen=True)
class Totals:
    """Sums over all micro-batches and replicas, the same on every rank."""

    loss_sum: float
    num_tokens: int
    metrics: dict[str, Mean | Max]  # of numbers


@dataclass(frozen=True)
class Outcome:
    """What one micro-batch gave; scalar tensors in fp64."""

    loss_sum: Tensor
    num_tokens: Tensor
    means: dict[str, tuple[Tensor, Tensor]]  # total and count
    maxima: dict[str, Tensor]


def check_micro_batches(micro_batches: list[PackedBatch], layout: ParallelLayout, multiple_of: int) -> None:
    """ValueError for micro-batches that the schedule or the layers cannot run."""
    if not micro_batches:
        raise ValueError("no micro-batches; give every replica the same number, at least one (fillers carry no loss)")
    if layout.vpp_size and len(micro_batches) % layout.pp.size:
        raise ValueError(
            f"{len(micro_batches)} micro-batches: virtual pipeline parallelism needs a multiple of "
            f"pipeline_model_parallel_size ({layout.pp.size}); add filler micro-batches"
        )
    for i, batch in enumerate(micro_batches):
        tokens = batch.tokens.numel()
        if tokens % multiple_of:
            raise ValueError(
                f"micro-batch {i} has {tokens} tokens: sequence and context parallelism and the FP8 recipe need a "
                f"multiple of {multiple_of}; pack with multiple_of={multiple_of}"
            )
        if int(batch.cu_seqlens[-1]) != tokens:
            raise ValueError(f"micro-batch {i} has {tokens} tokens but cu_seqlens ends at {int(batch.cu_seqlens[-1])}")
        chunks = 2 * layout.cp.size
        if layout.cp.size > 1 and bool((batch.cu_seqlens % chunks).any()):
            raise ValueError(
                f"micro-batch {i} has an answer whose tokens cannot be cut into {chunks} equal chunks for "
                f"{layout.cp.size} context-parallel ranks; pack with segment_multiple={chunks}"
            )


def finalize(model: list[nn.Module], num_tokens: Tensor | None = None, **kwargs: object) -> None:
    """Megatron's reduction of gradients over ranks, without its division by tokens."""
    finalize_model_grads(model, None, **kwargs)


def forward_backward(
    chunks: list[nn.Module],
    micro_batches: list[PackedBatch],
    objective: Objective,
    denominator: float,
    inputs: StepInputs,
    layout: ParallelLayout,
) -> Totals:
    """Gradients into the chunks' buffers, reduced over all ranks; the sums for the report."""
    outcomes: list[Outcome] = []

    find_loss = _loss_in_one_pass if inputs.one_pass and objective.per_token else _loss

    def loss_of(
        batch: PackedBatch, split: TokenSplit, model: PolicyModel, hidden: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        loss, logprobs, per_token = find_loss(hidden, model, batch, split, objective, denominator, inputs)
        with torch.no_grad():
            metrics = objective.metrics(logprobs, per_token, batch)
        trained = batch.loss_mask > 0
        outcomes.append(Outcome(per_token.sum().double(), trained.sum().double(), *_scalars(metrics, hidden.device)))
        return loss, torch.zeros((), dtype=torch.int, device=hidden.device), {}

    _run(chunks, micro_batches, loss_of, inputs, layout, forward_only=False)
    return _totals(outcomes, layout)


@torch.no_grad()
def forward_logprobs(
    chunks: list[nn.Module],
    micro_batches: list[PackedBatch],
    inputs: StepInputs,
    layout: ParallelLayout,
    *,
    with_entropy: bool = False,
) -> list[Tensor]:
    """Log-probs of every micro-batch, fp32 [1, T], on every rank of the replica. `with_entropy`, [2, T]: below them the
    entropy in nats of the distribution from which each label is drawn."""

    def logprobs_of(
        batch: PackedBatch, split: TokenSplit, model: PolicyModel, hidden: Tensor, non_loss_data: bool = True
    ) -> Tensor:
        logprobs, entropy = _logprobs(hidden, model, split.own(batch.labels), inputs, with_entropy=with_entropy)
        return torch.stack([split.whole(row) for row in (logprobs, entropy) if row is not None])

    found = _run(chunks, micro_batches, logprobs_of, inputs, layout, forward_only=True)
    if layout.pp.size == 1:
        return found
    lengths = [batch.tokens.numel() for batch in micro_batches]
    shape = (2 if with_entropy else 1, sum(lengths))
    flat = torch.cat(found, dim=1) if layout.is_last_stage else torch.empty(shape, device=layout.device)
    dist.broadcast(flat, layout.last_stage_rank, group=layout.pp.group)
    return list(torch.split(flat, lengths, dim=1))


def _run(
    chunks: list[nn.Module],
    micro_batches: list[PackedBatch],
    last: Callable[..., object],
    inputs: StepInputs,
    layout: ParallelLayout,
    *,
    forward_only: bool,
) -> list[Tensor]:
    """Megatron's schedule. `last(batch, split, model, hidden)` runs on the last stage."""
    splits = [TokenSplit.of(batch.cu_seqlens, layout.cp) for batch in micro_batches]
    params = [packed_params(batch, inputs.engine, split) for batch, split in zip(micro_batches, splits)]
    prepared = list(zip(micro_batches, splits, params))

    def forward(
        data: Iterator[tuple[PackedBatch, TokenSplit, PackedSeqParams]], chunk: nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], object]]:
        batch, split, segments = next(data)
        tokens, positions = split.own(batch.tokens), split.own(batch.position_ids)
        hidden = chunk(tokens[None], positions[None], None, packed_seq_params=segments)
        if chunk is chunks[0]:
            inputs.on_micro_batch()
        model = unwrap(chunk)
        if model.post_process:
            _await_output_weight(chunk, model)
        return hidden, partial(last, batch, split, model)

    several = len(chunks) > 1
    found: list[Tensor] = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter(prepared) for _ in chunks] if several else iter(prepared),
        model=chunks if several else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=max(batch.tokens.numel() for batch in micro_batches),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    return found


def _await_output_weight(ddp: nn.Module, model: PolicyModel) -> None:
    """Wait until the output weight is gathered. Megatron does that where a module is called, and we call no output
    layer."""
    if getattr(ddp, "use_forward_hook", False):  # with overlap_param_gather
        bucket_of: Any = ddp.param_to_bucket_group
        bucket_of[model.output_weight].finish_param_sync()


def _loss(
    hidden: Tensor,
    model: PolicyModel,
    batch: PackedBatch,
    split: TokenSplit,
    objective: Objective,
    denominator: float,
    inputs: StepInputs,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of the losses / denominator with its gradient, log-probs [T], losses [T]) of a micro-batch."""
    logprobs = split.whole(_logprobs(hidden, model, split.own(batch.labels), inputs)[0])
    per_token = _token_losses(logprobs, batch, objective)
    return per_token.sum() / denominator, logprobs.detach(), per_token.detach()


def _loss_in_one_pass(
    hidden: Tensor,
    model: PolicyModel,
    batch: PackedBatch,
    split: TokenSplit,
    objective: Objective,
    denominator: float,
    inputs: StepInputs,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, on the tokens of one rank: `split` is that of one context-parallel rank."""

    def token_loss(logprobs: Tensor, rows: slice) -> Tensor:
        return _token_losses(logprobs, batch.tokens_of(rows), objective)

    return linear_loss(
        hidden.squeeze(1),
        model.output_weight,
        split.own(batch.labels),
        token_loss,
        scale=1 / denominator,
        weight_is_shared=model.share_embeddings_and_output_weights and model.pre_process,
        tp_group=model.pg_collection.tp,
        vocab_size=inputs.vocab_size,
        sequence_parallel=model.config.sequence_parallel,
        chunk_tokens=inputs.chunk_tokens,
        temperature=inputs.temperature,
        use_triton=inputs.use_triton,
    )


def _token_losses(logprobs: Tensor, batch: PackedBatch, objective: Objective) -> Tensor:
    """What each token adds to the loss, [T]; 0 outside the mask."""
    per_token = objective.loss(logprobs, batch)
    if per_token.shape != logprobs.shape:
        raise ValueError(
            f"the loss has shape {tuple(per_token.shape)}; it must have one value per token, {tuple(logprobs.shape)}"
        )
    return (per_token * batch.weights).where(batch.loss_mask > 0, 0)


def _logprobs(
    hidden: Tensor, model: PolicyModel, labels: Tensor, inputs: StepInputs, *, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    return linear_logprobs(
        hidden.squeeze(1),
        model.output_weight,
        labels,
        tp_group=model.pg_collection.tp,
        vocab_size=inputs.vocab_size,
        sequence_parallel=model.config.sequence_parallel,
        chunk_tokens=inputs.chunk_tokens,
        temperature=inputs.temperature,
        use_triton=inputs.use_triton,
        with_entropy=with_entropy,
    )


def _scalars(
    metrics: dict[str, Mean | Max], device: torch.device
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Total and count of each mean, and each maximum, from numbers or tensors of any shape, as scalar fp64 tensors."""

    def tensor(part: Tensor | float) -> Tensor:
        return torch.as_tensor(part).detach().to(device, torch.double)

    means, maxima = {}, {}
    for name, metric in metrics.items():
        if isinstance(metric, Mean):
            means[name] = tensor(metric.total).sum(), tensor(metric.count).sum()
        elif isinstance(metric, Max):
            values = tensor(metric.value)
            maxima[name] = values.amax() if values.numel() else values.new_tensor(-math.inf)
        else:
            raise TypeError(f"metric {name} is a {type(metric).__name__}, not a Mean or Max of megatron_nft.metrics")
    return means, maxima


def _totals(outcomes: list[Outcome], layout: ParallelLayout) -> Totals:
    """Reduce over micro-batches and replicas on the last stage, then tell the other stages."""
    if layout.pp.size == 1:
        return _reduced(outcomes, layout)
    told: list[Any] = [_reduced(outcomes, layout) if layout.is_last_stage else None]
    source = layout.replica_ranks[layout.dp.rank][-layout.ranks_per_stage]  # the first of the last stage
    dist.broadcast_object_list(told, source, group=layout.replica_gloo)
    totals: Totals = told[0]
    return totals


def _reduced(outcomes: list[Outcome], layout: ParallelLayout) -> Totals:
    means, maxima = sorted(outcomes[0].means), sorted(outcomes[0].maxima)
    for outcome in outcomes:
        if (sorted(outcome.means), sorted(outcome.maxima)) != (means, maxima):
            raise ValueError(
                f"the algorithm returned metrics {sorted({**outcome.means, **outcome.maxima})} after "
                f"{sorted(means + maxima)}; the names must not change, nor whether one is a Mean or a Max"
            )
    rows = [[o.loss_sum, o.num_tokens, *(part for name in means for part in o.means[name])] for o in outcomes]
    summed = torch.stack([torch.stack(row) for row in rows]).sum(0)
    dist.all_reduce(summed, group=layout.dp.group)
    loss_sum, num_tokens, *parts = summed.tolist()
    metrics: dict[str, Mean | Max] = {}
    for name, total, count in zip(means, parts[::2], parts[1::2], strict=True):
        metrics[name] = Mean(total, count)
    if maxima:
        largest = torch.stack([torch.stack([o.maxima[name] for name in maxima]) for o in outcomes]).amax(0)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=layout.dp.group)
        metrics |= {name: Max(value) for name, value in zip(maxima, largest.tolist(), strict=True)}
    return Totals(loss_sum, int(num_tokens), metrics)
