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
    fates: list[bool],
    order: random.Random,
    *,
    per_step: int,
    staleness: int,
    overlapped: bool,
    put_off: list[bool] | None = None,
) -> list[tuple[int, list[int]]]:
    """(step, draws) of every training step; groups end in an order of `order`. Asserts the bound on ages.

    put_off: by step, whether its sync is put off if it may be: the engine stays with the version that it has.
    """
    window, cursor, under_way, started, version = Window(), 0, [], {}, 0
    steps: list[tuple[int, list[int]]] = []

    def start() -> None:
        nonlocal cursor
        window.start(cursor)
        started[cursor] = version
        under_way.append(cursor)
        cursor += 1

    while True:
        behind = len(steps) - version
        while window.room((staleness + 1 - behind) * per_step) and cursor < len(fates):
            start()
        if (draws := window.next_groups(per_step)) is not None:
            assert all(len(steps) - started[draw] <= staleness for draw in draws)
            window.remove(draws)
            if overlapped:  # while the step is trained; its number is not counted up yet
                for ended in order.sample(under_way, order.randrange(len(under_way) + 1)):
                    while window.room((staleness - behind) * per_step) and cursor < len(fates):
                        start()
                    under_way.remove(ended)
                    window.decide(ended, kept=fates[ended])
                while window.room((staleness - behind) * per_step) and cursor < len(fates):
                    start()
            steps.append((len(steps), draws))
            waits = put_off is not None and put_off[len(steps) % len(put_off)]
            if not waits or len(steps) - version > staleness:
                version = len(steps)
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


@given(
    fates=st.lists(st.booleans(), max_size=200),
    seed=st.integers(0, 999),
    per_step=st.integers(1, 8),
    staleness=st.integers(1, 4),
    put_off=st.lists(st.booleans(), min_size=1, max_size=12),
)
def test_syncs_that_are_put_off_change_neither_what_is_trained_nor_its_bound(fates, seed, per_step, staleness, put_off):
    kept = [draw for draw, is_kept in enumerate(fates) if is_kept]
    options = {"per_step": per_step, "staleness": staleness, "overlapped": True, "put_off": put_off}
    trained = [draw for _, draws in run(fates, random.Random(seed), **options) for draw in draws]
    assert trained == kept[: len(trained)]
    assert len(kept) - len(trained) < per_step  # every step finds its groups, however far the engine is behind


def test_once_as_many_syncs_as_the_bound_and_one_more_were_put_off_nothing_is_open():
    """Questions are started as early as may be; after staleness + 1 steps without a sync all of them were trained."""
    per_step, staleness, window, cursor = 3, 2, Window(), 0
    for behind in range(staleness + 1):
        for limit in ((staleness + 1 - behind) * per_step, (staleness - behind) * per_step):
            while window.room(limit):
                window.start(cursor)
                window.decide(cursor, kept=True)
                cursor += 1
            if limit == (staleness + 1 - behind) * per_step:
                window.remove(window.next_groups(per_step))
    assert (cursor, window.next_groups(1)) == ((staleness + 1) * per_step, None)


def test_a_group_that_was_never_started_cannot_be_decided():
    with pytest.raises(KeyError):
        Window().decide(3, kept=False)
