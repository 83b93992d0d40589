"""Forward and backward over micro-batches. All rescaling of losses and gradients stands in this file.

The gradient that the optimizer sees is, whatever the data, tensor, pipeline, sequence or virtual-pipeline layout, the
packing and the split into micro-batches,

    d/dtheta  sum over replicas, micro-batches and tokens with loss_mask 1 of the per-token loss  /  denominator

Megatron would divide by micro-batches, tokens and data-parallel ranks at several places. With
`calculate_per_token_loss` it only ever sums: the schedule does not touch the loss, DistributedDataParallel adds up
over data-parallel ranks, and `finalize` hands Megatron no token count to divide by. The one division is `_loss_of`.
Gradient clipping comes after, in policy/update.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_nft.policy.logprobs import linear_logprobs
from megatron_nft.policy.model import PolicyModel, packed_params
from megatron_nft.policy.parallel import ParallelLayout
from megatron_nft.types import PackedBatch

Loss = Callable[[Tensor, PackedBatch], tuple[Tensor, dict[str, Tensor]]]
"""(log-probs fp32 [T], batch) -> (per-token loss [T], metrics). Values outside loss_mask are ignored. Metrics are
tensors or numbers that are summed over their elements, micro-batches and replicas; those named `max_...` are maxima.
Every call must return the same names."""


@dataclass(frozen=True)
class StepInputs:
    """What a forward pass needs besides the batch."""

    temperature: float
    chunk_tokens: int
    vocab_size: int
    engine: bool  # Transformer Engine layers
    on_micro_batch: Callable[[], object]  # called after each forward of a micro-batch by this rank's first chunk


@dataclass(frozen=True)
class Totals:
    """Sums over all micro-batches and replicas, the same on every rank."""

    loss_sum: float
    num_tokens: int
    metrics: dict[str, float]


def unwrap(chunk: nn.Module) -> PolicyModel:
    """The model inside Megatron's DistributedDataParallel."""
    return chunk.module if hasattr(chunk, "module") else chunk


def check_micro_batches(micro_batches: list[PackedBatch], layout: ParallelLayout, multiple_of: int) -> None:
    """ValueError for micro-batches that the schedule or the layers cannot run."""
    if not micro_batches:
        raise ValueError("no micro-batches; give every replica the same number, at least one (fillers carry no loss)")
    if layout.vpp_size and len(micro_batches) % layout.pp_size:
        raise ValueError(
            f"{len(micro_batches)} micro-batches: virtual pipeline parallelism needs a multiple of "
            f"pipeline_model_parallel_size ({layout.pp_size}); add filler micro-batches"
        )
    for i, batch in enumerate(micro_batches):
        tokens = batch.tokens.numel()
        if tokens % multiple_of:
            raise ValueError(
                f"micro-batch {i} has {tokens} tokens: sequence parallelism and the FP8 recipe need a multiple of "
                f"{multiple_of}; pack with multiple_of={multiple_of}"
            )
        if int(batch.cu_seqlens[-1]) != tokens:
            raise ValueError(f"micro-batch {i} has {tokens} tokens but cu_seqlens ends at {int(batch.cu_seqlens[-1])}")


def finalize(model: list[nn.Module], num_tokens: Tensor | None = None, **kwargs: object) -> None:
    """Megatron's reduction of gradients over ranks, without its division by tokens."""
    finalize_model_grads(model, None, **kwargs)


def forward_backward(
    chunks: list[nn.Module],
    micro_batches: list[PackedBatch],
    loss: Loss,
    denominator: float,
    inputs: StepInputs,
    layout: ParallelLayout,
) -> Totals:
    """Gradients into the chunks' buffers, reduced over all ranks; the sums for the report."""
    outcomes: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []

    def loss_of(batch: PackedBatch, model: PolicyModel, hidden: Tensor) -> tuple[Tensor, Tensor, dict]:
        per_token, metrics = loss(_logprobs(hidden, model, batch, inputs), batch)
        trained = batch.loss_mask > 0
        loss_sum = per_token.where(trained, 0).sum()
        outcomes.append((loss_sum.detach().double(), trained.sum(), _detached(metrics)))
        return loss_sum / denominator, torch.zeros((), dtype=torch.int, device=hidden.device), {}

    _run(chunks, micro_batches, loss_of, inputs, forward_only=False)
    return _totals(outcomes, layout)


@torch.no_grad()
def forward_logprobs(
    chunks: list[nn.Module], micro_batches: list[PackedBatch], inputs: StepInputs, layout: ParallelLayout
) -> list[Tensor]:
    """Log-probs fp32 [T] of every micro-batch, on every rank of the replica."""

    def logprobs_of(batch: PackedBatch, model: PolicyModel, hidden: Tensor, non_loss_data: bool = True) -> Tensor:
        return _logprobs(hidden, model, batch, inputs)

    found = _run(chunks, micro_batches, logprobs_of, inputs, forward_only=True)
    if layout.pp_size == 1:
        return found
    lengths = [batch.tokens.numel() for batch in micro_batches]
    flat = torch.cat(found) if layout.is_last_stage else torch.empty(sum(lengths), device=layout.device)
    dist.broadcast(flat, layout.last_stage_rank, group=layout.pp_group)
    return list(flat.split(lengths))


def _run(
    chunks: list[nn.Module],
    micro_batches: list[PackedBatch],
    last: Callable[..., object],
    inputs: StepInputs,
    *,
    forward_only: bool,
) -> list[Tensor]:
    """Megatron's schedule. `last(batch, model, hidden)` runs on the last stage."""
    prepared = [(batch, packed_params(batch, inputs.engine)) for batch in micro_batches]

    def forward(data: Iterator[tuple[PackedBatch, PackedSeqParams]], chunk: nn.Module) -> tuple[Tensor, Callable]:
        batch, params = next(data)
        hidden = chunk(batch.tokens[None], batch.position_ids[None], None, packed_seq_params=params)
        if chunk is chunks[0]:
            inputs.on_micro_batch()
        return hidden, partial(last, batch, unwrap(chunk))

    several = len(chunks) > 1
    return get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter(prepared) for _ in chunks] if several else iter(prepared),
        model=chunks if several else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=max(batch.tokens.numel() for batch in micro_batches),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def _logprobs(hidden: Tensor, model: PolicyModel, batch: PackedBatch, inputs: StepInputs) -> Tensor:
    logprobs, _ = linear_logprobs(
        hidden.squeeze(1),
        model.output_weight,
        batch.labels,
        tp_group=model.pg_collection.tp,
        vocab_size=inputs.vocab_size,
        sequence_parallel=model.config.sequence_parallel,
        chunk_tokens=inputs.chunk_tokens,
        temperature=inputs.temperature,
    )
    return logprobs


def _detached(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    reduced = {}
    for name, value in metrics.items():
        value = torch.as_tensor(value).detach().double()
        reduced[name] = (value.amax() if value.numel() else value.sum()) if name.startswith("max_") else value.sum()
    return reduced


def _totals(outcomes: list[tuple[Tensor, Tensor, dict[str, Tensor]]], layout: ParallelLayout) -> Totals:
    """Reduce over micro-batches and replicas on the last stage, then tell the other stages."""
    totals = [_reduced(outcomes, layout)] if layout.is_last_stage else [None]
    if layout.pp_size > 1:
        source = layout.replica_ranks[layout.dp_rank][-layout.tp_size]  # TP rank 0 of the last stage
        dist.broadcast_object_list(totals, source, group=layout.replica_gloo)
    return totals[0]


def _reduced(outcomes: list[tuple[Tensor, Tensor, dict[str, Tensor]]], layout: ParallelLayout) -> Totals:
    names = sorted(outcomes[0][2])
    for _, _, metrics in outcomes:
        if sorted(metrics) != names:
            raise ValueError(f"the loss returned metrics {sorted(metrics)} after {names}; the names must not change")
    sums = [name for name in names if not name.startswith("max_")]
    maxima = [name for name in names if name.startswith("max_")]
    rows = [torch.stack([s, n.double(), *(m[name].to(s.device) for name in sums)]) for s, n, m in outcomes]
    summed = torch.stack(rows).sum(0)
    dist.all_reduce(summed, group=layout.dp_group)
    values = dict(zip(sums, summed[2:].tolist(), strict=True))
    if maxima:
        rows = [torch.stack([m[name].to(s.device) for name in maxima]) for s, _, m in outcomes]
        largest = torch.stack(rows).amax(0)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=layout.dp_group)
        values |= dict(zip(maxima, largest.tolist(), strict=True))
    return Totals(summed[0].item(), int(summed[1].item()), values)
