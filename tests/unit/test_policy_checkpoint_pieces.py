"""Ranges of flattened tensors as boxes, against numpy's own idea of where an element lies."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_nft.policy.checkpoint_pieces import boxes


@pytest.mark.parametrize("shape", [(), (7,), (4, 5), (1, 6), (3, 1), (3, 2, 4), (2, 1, 3, 2)])
def test_boxes_hold_a_range_in_its_order_and_nothing_else(shape):
    size = math.prod(shape)
    places = np.arange(size).reshape(shape)
    for start in range(size + 1):
        for stop in range(start, size + 1):
            found, count = [], 0
            for offsets, sizes in boxes(shape, start, stop):
                box = places[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
                assert box.shape == sizes and box.size > 0
                found += box.flatten().tolist()
                count += 1
            assert found == list(range(start, stop)), (shape, start, stop)
            assert count <= max(1, 2 * len(shape) - 1)


def test_the_example_of_the_module():
    assert list(boxes((4, 5), 3, 17)) == [((0, 3), (1, 2)), ((1, 0), (2, 5)), ((3, 0), (1, 2))]
