"""Balance answers over data-parallel ranks."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np


def attention_cost(lengths: Sequence[int] | np.ndarray, hidden_size: int) -> np.ndarray:
    """Return the relative forward cost of sequences of `lengths` tokens: 12 h L + L^2, float64 [n].

    A dense layer has about 12 h^2 weights, so 24 h^2 L FLOPs in its matrices, and causal attention takes
    2 h L^2 (scores and values, half of the square). Divided by 2 h:

        attention_cost([100, 1000], 10)  # [22000, 1120000]
    """
    L = np.asarray(lengths, dtype=np.float64)
    return 12.0 * hidden_size * L + L * L


def balance(costs: Sequence[float] | np.ndarray, num_bins: int) -> list[list[int]]:
    """Split positions 0..n-1 into `num_bins` lists of nearly equal total cost.

    Largest differencing (Karmarkar and Karp, 1982): every position starts as a solution of its own, and the two
    solutions whose bins differ most are merged, heaviest bin onto lightest, until one is left. Bins come out
    heaviest first, positions in them ascending; the result depends on the costs alone. Bins are empty where
    there are fewer positions than bins.

        balance([8, 7, 6, 5, 4], 2)  # [[1, 3, 4], [0, 2]]: 16 and 14
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, not {num_bins}")
    if len(costs) == 0:
        return [[] for _ in range(num_bins)]
    # heap entry: (-(heaviest - lightest bin), tie break, bins); bins: [(load, positions)] heaviest first, no empty ones
    heap: list[tuple[float, int, list[tuple[float, list[int]]]]] = [
        (-float(cost), i, [(float(cost), [i])]) for i, cost in enumerate(costs)
    ]
    heapq.heapify(heap)
    while len(heap) > 1:
        _, tie, merged = heapq.heappop(heap)
        _, _, second = heapq.heappop(heap)
        taken = len(merged)
        for j, (load, positions) in enumerate(second):
            at = num_bins - 1 - j  # the heaviest of one onto the lightest of the other, which may be empty
            if at < taken:
                merged[at] = (merged[at][0] + load, _join(merged[at][1], positions))
            else:
                merged.append((load, positions))
        merged.sort(key=lambda bin: bin[0], reverse=True)
        lightest = merged[-1][0] if len(merged) == num_bins else 0.0
        heapq.heappush(heap, (lightest - merged[0][0], tie, merged))
    bins = [sorted(positions) for _, positions in heap[0][2]]
    return bins + [[] for _ in range(num_bins - len(bins))]


def _join(x: list[int], y: list[int]) -> list[int]:
    """Both lists in one; the longer is extended in place, so that all merges together cost n log n."""
    if len(x) < len(y):
        x, y = y, x
    x.extend(y)
    return x
