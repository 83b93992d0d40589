"""The progress of a command: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console as RichConsole

from megatron_nft import console
from megatron_nft.console import Progress, format_seconds, show_progress


def lines(monkeypatch, amounts, description="asking", total=None, **options) -> list[str]:
    """What is printed where every `(seconds, amount, name)` of `amounts` is reported at its time after the start."""
    clock = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    with show_progress(description, total, console=RichConsole(file=out, width=300), **options) as progress:
        for seconds, amount, name in amounts:
            clock[0] = 1000.0 + seconds
            progress.advance(amount, name)
    return out.getvalue().splitlines()


def test_a_line_every_30_s_with_an_estimate_that_leaves_earlier_work_out(monkeypatch):
    steps = [(29, 50, ""), (40, 30, ""), (69, 10, ""), (80, 10, "")]
    assert lines(monkeypatch, steps, total=400, done=100) == [
        "asking: 180/400, 2.0 per second, about 2 min left",
        "asking: 200/400, 1.2 per second, about 3 min left",
    ]


def test_bytes_are_told_in_gigabytes_under_the_name_of_the_part(monkeypatch):
    steps = [(1, 10**9, "a"), (9, 10**9, "b"), (40, 10**9, "c"), (41, 10**9, "d")]
    assert lines(monkeypatch, steps, "moving", 4 * 10**9, in_bytes=True) == [
        "moving c: 3.00 of 4.00 GB, 75 MB/s, about 13 s left"
    ]


def test_an_unknown_total_leaves_the_estimate_out(monkeypatch):
    assert lines(monkeypatch, [(30, 15, "")]) == ["asking: 15, 0.5 per second"]
    assert lines(monkeypatch, [(30, 3 * 10**9, "")], in_bytes=True) == ["asking: 3.00 GB, 100 MB/s"]


def test_a_total_may_come_later(monkeypatch):
    monkeypatch.setattr(console, "LINE_EVERY_S", 0.0)
    out = io.StringIO()
    with show_progress("reading", console=RichConsole(file=out, width=300)) as progress:
        progress.expect(8)
        progress.advance(4)
    assert out.getvalue().startswith("reading: 4/8")


@pytest.mark.parametrize(("in_bytes", "shown"), [(False, "3/4"), (True, "3/4 bytes")])
def test_a_bar_on_a_terminal(in_bytes, shown):
    out = io.StringIO()
    with show_progress(
        "moving", 4, in_bytes=in_bytes, console=RichConsole(file=out, force_terminal=True, width=200)
    ) as p:
        p.advance(3, "the third")
    assert "moving" in out.getvalue() and shown in out.getvalue() and "the third" in out.getvalue()


def test_the_base_class_shows_nothing(capsys):
    progress = Progress()
    progress.expect(3)
    progress.advance(2, "x")
    assert capsys.readouterr() == ("", "")


def test_seconds_are_told_in_the_unit_that_fits():
    assert [format_seconds(s) for s in (0.4, 89, 90, 5399, 12600)] == ["0 s", "89 s", "2 min", "90 min", "3.5 h"]
