"""The window: groups train in draw order, within max_staleness steps of their start, whatever ends first."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_nft.train.window import Window


def test_a_small_case_by_hand():
    window = Window([10, 7])
    assert window.room(4) == 2
    window.start(11)
    window.start(12)
    assert window.room(4) == 0
    window.decide(11, kept=True)
    assert window.next_groups(1) is None  # 7 comes first
    window.decide(7, kept=False)
    assert (window.next_groups(1), window.room(4)) == (None, 1)
    window.decide(10, kept=True)
    assert window.next_groups(2) == [10, 11]
    assert window.next_groups(3) is None  # 12 is under way
    window.remove([10, 11])
    assert (window.room(4), window.room(0)) == (3, 0)


def run(
    fates: list[bool], order: random.Random, *, per_step: int, staleness: int, overlapped: bool
) -> list[tuple[int, list[int]]]:
    """(step, draws) of every training step; groups end in an order of `order`. Asserts the bound on ages."""
    window, cursor, under_way, started = Window(), 0, [], {}
    steps: list[tuple[int, list[int]]] = []

    def start() -> None:
        nonlocal cursor
        window.start(cursor)
        started[cursor] = len(steps)
        under_way.append(cursor)
        cursor += 1

    while True:
        while window.room((staleness + 1) * per_step) and cursor < len(fates):
            start()
        if (draws := window.next_groups(per_step)) is not None:
            assert all(len(steps) - started[draw] <= staleness for draw in draws)
            window.remove(draws)
            if overlapped:  # while the step is trained; its number is not counted up yet
                while window.room(staleness * per_step) and cursor < len(fates):
                    start()
            steps.append((len(steps), draws))
        elif under_way:
            ended = under_way.pop(order.randrange(len(under_way)))
            window.decide(ended, kept=fates[ended])
        else:
            return steps


@given(
    fates=st.lists(st.booleans(), max_size=200),
    seeds=st.tuples(st.integers(0, 999), st.integers(0, 999)),
    per_step=st.integers(1, 8),
    staleness=st.integers(1, 4),
    overlapped=st.booleans(),
)
def test_what_is_trained_is_decided_by_draw_order_alone(fates, seeds, per_step, staleness, overlapped):
    kept = [draw for draw, is_kept in enumerate(fates) if is_kept]
    options = {"per_step": per_step, "staleness": staleness, "overlapped": overlapped}
    one, other = (run(fates, random.Random(s), **options) for s in seeds)
    assert one == other
    trained = [draw for _, draws in one for draw in draws]
    assert trained == kept[: len(trained)]
    assert len(kept) - len(trained) < per_step


def test_a_group_that_was_never_started_cannot_be_decided():
    with pytest.raises(KeyError):
        Window().decide(3, kept=False)
