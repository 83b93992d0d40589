"""Reductions over ranks, and what a resumed run does to metrics.jsonl."""

import json
import math

import pytest

from megatron_nft.metrics import JsonlSink, Max, Mean, Metrics, TensorBoardSink


def test_mean_is_weighted_over_ranks():
    a, b = Metrics(), Metrics()
    a.mean("length", 30, 3)  # 10, 10, 10
    b.mean("length", 2, 1)
    b.mean("length", 8, 1)
    # (30 + 2 + 8) / 5, not the mean of 10 and 5
    assert Metrics.merge([a.state(), b.state()])["length"] == 8


def test_figures_go_on_where_an_earlier_process_left_them():
    """As a checkpoint carries them: the state as JSON."""
    before = Metrics()
    before.mean("length", 30, 3)
    before.sum("seconds/train", 2.0)
    before.max("gap", math.nan)
    before.histogram("rates", [1, 2])
    after = Metrics(json.loads(json.dumps(before.state())))
    after.sum("seconds/train", 0.5)
    after.mean("length", 10, 1)
    record = Metrics.merge([after.state()])
    assert (record["length"], record["seconds/train"], record["rates"]) == (10.0, 2.5, [1, 2])
    assert math.isnan(record["gap"])
    with pytest.raises(ValueError, match="length is a mean"):
        after.max("length", 1)


def test_sum_max_histogram():
    a, b = Metrics(), Metrics()
    for m, v in ((a, 2.0), (b, 5.0)):
        m.sum("kept", v)
        m.max("ratio", -v)
        m.histogram("rates", [1, 0, int(v)])
    assert Metrics.merge([a.state(), b.state()]) == {"kept": 7.0, "ratio": -2.0, "rates": [2, 0, 7]}


def test_mean_of_nothing_is_none_and_kinds_do_not_mix():
    m = Metrics()
    m.mean("x", 0, 0)
    assert Metrics.merge([m.state()]) == {"x": None}
    with pytest.raises(ValueError, match="x is a mean"):
        m.sum("x", 1)


def test_means_and_maxima_add_themselves():
    metrics = Metrics()
    for value in (Mean(3.0, 2), Mean(1.0, 6)):
        metrics.add("mean", value)
    for value in (Max(-2.0), Max(-math.inf), Max(-3.0)):
        metrics.add("max", value)
    metrics.add("nothing seen", Max(-math.inf))
    metrics.add("nothing counted", Mean(0.0, 0))
    assert Metrics.merge([metrics.state()]) == {
        "mean": 0.5,
        "max": -2.0,
        "nothing seen": None,
        "nothing counted": None,
    }
    with pytest.raises(ValueError, match="is a mean"):
        metrics.add("mean", Max(1.0))


def test_a_nan_maximum_is_not_hidden():
    m = Metrics()
    m.max("gap", 1.0)
    m.max("gap", math.nan)
    assert math.isnan(Metrics.merge([m.state()])["gap"])


def test_resume_drops_later_steps_and_a_half_written_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 3, "a"')
    sink = JsonlSink(path, first_step=2)
    assert sink.last_step == 1
    sink.write(2, {"a": 20.0, "bad": math.nan})
    sink.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"step": 1, "a": 1}, {"step": 2, "a": 20.0, "bad": "nan"}]


def test_tensorboard_reads_back_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path, 0)
    sink.write(3, {"loss/total": 0.5, "correct_rate/hist": [2, 0, 1]})
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/total")] == [(3, 0.5)]
    assert events.Histograms("correct_rate/hist")[0].histogram_value.num == 3
