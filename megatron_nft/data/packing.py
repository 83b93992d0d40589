"""Packing answers of many lengths into (thd) micro-batches.

Invariants, each asserted by a test:
- a micro-batch never holds more than `token_cap` tokens, padding included;
- every sample is in exactly one micro-batch;
- padding at the end is shorter than `multiple_of`, with loss_mask 0; its segments repeat the longest sample, the last
  one only its beginning: these activations are in the micro-batch anyway, so that the scales of FP8 do not change;
- every segment, the padding's too, is a multiple of `segment_multiple`, which divides `multiple_of`: a sample is
  followed, within its segment, by its own beginning, with loss_mask 0.

T: tokens of a micro-batch, S: its segments, P / R: prompt and response tokens of a sample.
"""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import torch

from megatron_nft.data.balance import attention_cost, balance
from megatron_nft.types import PackedBatch, TrainingSample

__all__ = ["attention_cost", "balance", "filler", "pack", "plan_micro_batches", "unpack"]


def plan_micro_batches(
    lengths: Sequence[int] | np.ndarray,
    token_cap: int,
    *,
    multiple_of: int = 1,
    segment_multiple: int = 1,
    num_micro_batches: int | None = None,
) -> list[list[int]]:
    """Return which positions of `lengths` (tokens per sample) share a micro-batch.

    Best-fit decreasing: from the longest on, each sample, rounded up to `segment_multiple`, goes where it leaves the
    least free space. Totals rounded up to `multiple_of` stay within `token_cap`. With `num_micro_batches`,
    micro-batches are split in two until there are that many; where samples run out, the rest are empty lists, for which
    `pack` returns the filler.

        plan_micro_batches([5, 3, 3, 2], 8)                        # [[0, 1], [2, 3]]
        plan_micro_batches([5, 3, 3, 2], 8, num_micro_batches=5)   # [[0], [1], [2], [3], []]

    ValueError for a length outside 1..token_cap, or when `num_micro_batches` are too few.
    """
    _check_multiples(multiple_of, segment_multiple)
    capacity = token_cap // multiple_of * multiple_of
    sizes = [_round_up(int(n), segment_multiple) for n in lengths]
    for position, size in enumerate(sizes):
        if not 1 <= size <= capacity:
            raise ValueError(
                f"sample {position} has {int(lengths[position])} tokens; a micro-batch holds 1 to {capacity} "
                f"(cap {token_cap}, in multiples of {multiple_of}): raise policy.micro_batch_tokens"
            )
    bins = _best_fit_decreasing(sizes, capacity)
    if num_micro_batches is not None:
        if len(bins) > num_micro_batches:
            raise ValueError(
                f"{len(sizes)} samples of {sum(sizes)} tokens need {len(bins)} micro-batches of {token_cap} tokens, "
                f"but num_micro_batches is {num_micro_batches}: ask for at least {len(bins)}"
            )
        bins = _split_to(bins, sizes, num_micro_batches)
    return bins


def _check_multiples(multiple_of: int, segment_multiple: int) -> None:
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be at least 1, not {multiple_of}")
    if segment_multiple < 1 or multiple_of % segment_multiple:
        raise ValueError(f"segment_multiple ({segment_multiple}) must divide multiple_of ({multiple_of})")


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _best_fit_decreasing(sizes: list[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), ascending; full bins are left out
    for position in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[position]
        at = bisect_left(room, (size, -1))
        if at < len(room):
            free, chosen = room.pop(at)
        else:
            free, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(position)
        if free > size:
            insort(room, (free - size, chosen))
    return bins


def _split_to(bins: list[list[int]], sizes: list[int], wanted: int) -> list[list[int]]:
    """Halve the fullest bin that has two samples or more until there are `wanted`; empty bins where none has."""
    heap = [(-sum(sizes[i] for i in b), n, b) for n, b in enumerate(bins) if len(b) > 1]
    whole = [b for b in bins if len(b) == 1]
    heapq.heapify(heap)
    tie = len(bins)
    while heap and len(heap) + len(whole) < wanted:
        _, _, largest = heapq.heappop(heap)
        for half in balance([sizes[i] for i in largest], 2):
            part = [largest[i] for i in half]
            if len(part) == 1:
                whole.append(part)
            else:
                heapq.heappush(heap, (-sum(sizes[i] for i in part), tie, part))
                tie += 1
    out = [b for _, _, b in sorted(heap)] + whole
    return out + [[] for _ in range(wanted - len(out))]


def pack(
    samples: Sequence[TrainingSample],
    indices: Sequence[int],
    *,
    multiple_of: int = 1,
    segment_multiple: int = 1,
    device: torch.device | str = "cpu",
) -> PackedBatch:
    """Pack `samples[i] for i in indices` into one micro-batch; the filler when `indices` is empty.

    Samples whose behaviour log-probs are not computed yet get NaN there, so that a loss over them cannot pass.
    """
    _check_multiples(multiple_of, segment_multiple)
    if len(indices) == 0:
        return filler(multiple_of, device)
    chosen = [samples[i] for i in indices]
    for i, s in zip(indices, chosen):
        if s.prompt_length < 1:
            raise ValueError(f"sample {i} has an empty prompt: its first response token has nothing to follow")
    lengths = [len(s.input_ids) for s in chosen]
    padded = [_round_up(length, segment_multiple) for length in lengths]
    padding = -sum(padded) % multiple_of
    longest = max(chosen, key=lambda s: len(s.input_ids)).input_ids
    segments = np.array(padded + _parts(padding, max(padded)))
    ends = np.cumsum(segments)
    total, starts = int(ends[-1]), ends - segments

    tokens = np.zeros(total, np.int64)
    labels = np.zeros(total, np.int64)
    mask, behaviour, rollout, correct, advantage = (np.zeros(total, np.float32) for _ in range(5))
    rate = np.full(total, 0.5, np.float32)
    weights = np.ones(total, np.float32)
    for s, start, length, whole in zip(chosen, starts, lengths, padded):
        tokens[start : start + whole] = np.resize(s.input_ids, whole)
        labels[start : start + length - 1] = s.input_ids[1:]
        # Position P - 1 predicts the first response token, position P + R - 2 the last.
        response = slice(start + s.prompt_length - 1, start + length - 1)
        mask[response] = 1.0
        behaviour[response] = np.nan if s.behaviour_logprobs is None else s.behaviour_logprobs
        rollout[response] = s.rollout_logprobs
        correct[response] = float(s.correct) if s.reward is None else s.reward
        rate[response] = s.correct_rate
        advantage[response] = s.advantage
        if s.weights is not None:
            weights[response] = s.weights
    if padding:
        tokens[-padding:] = np.resize(np.resize(longest, max(padded)), padding)
    return PackedBatch(
        tokens=_tensor(tokens, device),
        position_ids=_tensor(np.arange(total) - np.repeat(starts, segments), device),
        labels=_tensor(labels, device),
        loss_mask=_tensor(mask, device),
        cu_seqlens=_tensor(np.concatenate([[0], ends]).astype(np.int32), device),
        max_seqlen=int(segments.max()),
        behaviour_logprobs=_tensor(behaviour, device),
        rollout_logprobs=_tensor(rollout, device),
        correct=_tensor(correct, device),
        correct_rate=_tensor(rate, device),
        advantage=_tensor(advantage, device),
        weights=_tensor(weights, device),
        segment_ids=_tensor(np.repeat(np.arange(len(segments)), segments), device),
        sample_ids=[int(i) for i in indices],
    )


def _parts(padding: int, longest: int) -> list[int]:
    """Lengths of the padding's segments: _parts(15, 7) = [7, 7, 1]."""
    whole, rest = divmod(padding, longest)
    return [longest] * whole + [rest] * (rest > 0)


def filler(multiple_of: int = 1, device: torch.device | str = "cpu") -> PackedBatch:
    """Return a micro-batch of `multiple_of` padding tokens that carries no loss."""
    zeros = torch.zeros(multiple_of, dtype=torch.float32, device=device)
    ids = torch.zeros(multiple_of, dtype=torch.int64, device=device)
    return PackedBatch(
        tokens=ids,
        position_ids=torch.arange(multiple_of, device=device),
        labels=ids.clone(),
        loss_mask=zeros,
        cu_seqlens=torch.tensor([0, multiple_of], dtype=torch.int32, device=device),
        max_seqlen=multiple_of,
        behaviour_logprobs=zeros.clone(),
        rollout_logprobs=zeros.clone(),
        correct=zeros.clone(),
        correct_rate=torch.full_like(zeros, 0.5),
        advantage=zeros.clone(),
        weights=torch.ones_like(zeros),
        segment_ids=ids.clone(),
        sample_ids=[],
    )


def unpack(values: torch.Tensor | np.ndarray, batch: PackedBatch) -> list[np.ndarray]:
    """Split `values` [T], in the order of `batch.tokens`, into those of every sample's response: float32 [R] each.

    ValueError for values of another shape.
    """
    values = torch.as_tensor(values)
    if values.shape != batch.tokens.shape:
        raise ValueError(f"values have shape {tuple(values.shape)}, the batch {tuple(batch.tokens.shape)}")
    flat = values.detach().to("cpu", torch.float32).numpy()
    mask = batch.loss_mask.cpu().numpy() > 0
    edges = batch.cu_seqlens[: len(batch.sample_ids) + 1].tolist()  # padding, if any, comes last
    return [flat[start:end][mask[start:end]].copy() for start, end in itertools.pairwise(edges)]


def _tensor(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
