"""What the page's chunks and index hold, read back by an independent reading of the layout in pack.py."""

import base64
import gzip
import io
import json
import re

import numpy as np
import pytest

from megatron_nft.report.entries import AnswerEntry, QuestionEntry
from megatron_nft.report.metrics_file import read_metrics, to_columns
from megatron_nft.report.pack import CHUNK_BYTES, Packer


def raw_elements(stream, name):
    """The content of the elements NAME-0, NAME-1, ... in a stream."""
    pattern = rb'<script type="text/plain" id="%s-(\d+)">([^<]*)</script>' % name.encode()
    found = re.findall(pattern, stream.getvalue())
    assert [int(number) for number, _ in found] == list(range(len(found)))
    return [gzip.decompress(base64.b64decode(text)) for _, text in found]


def read_elements(stream, name):
    """The same for elements that hold JSON."""
    return [json.loads(raw) for raw in raw_elements(stream, name)]


def unpack(stream):
    """All chunks as the page reads them: per chunk the JSON part, with each answer's three arrays put in."""
    chunks = []
    for raw in raw_elements(stream, "chunk"):
        length = int.from_bytes(raw[:4], "little")
        groups, at = json.loads(raw[4 : 4 + length]), 4 + length
        for answer in (a for g in groups for a in g["answers"] if a["hasTokens"]):
            for name, dtype in (("ids", "<u4"), ("engine", "<u2"), ("gap", "<i2")):
                answer[name] = np.frombuffer(raw, dtype, answer["tokens"], at)
                at += answer[name].nbytes
        assert at == len(raw)
        chunks.append(groups)
    return chunks


def entry(number, *answers, step=2):
    return QuestionEntry(step, number, "sums", f"What is {number}?", str(number), list(answers))


def answer(ids, engine, trainer, **kwargs):
    return AnswerEntry(
        "text", len(ids), kwargs.pop("finish", "stop"), kwargs.pop("verdict", "correct"), **kwargs,
        token_ids=np.array(ids, np.int32), rollout_logprobs=np.array(engine, np.float32),
        trainer_logprobs=None if trainer is None else np.array(trainer, np.float32),
    )  # fmt: skip


def pack(*entries):
    stream = io.BytesIO()
    packer = Packer(stream)
    packer.add(entries)
    return packer.index(), unpack(stream), packer


def test_tokens_come_back_in_their_units():
    index, [[group]], packer = pack(
        entry(5, answer([151_643, 7], [-0.25, -2.0], [-0.2, -2.5]), answer([7], [-1.0], None, verdict="wrong"))
    )
    first, second = group["answers"]
    assert first["ids"].tolist() == [151_643, 7]
    assert first["engine"].tolist() == [250, 2000]
    assert first["gap"].tolist() == [500, -5000]
    assert second["gap"].tolist() == [-32768]
    assert packer.token_ids == [7, 151_643]
    assert index["gapScale"] == pytest.approx(0.5)  # the 99th percentile of two gaps is the larger


def test_extremes_saturate_and_are_never_taken_for_missing():
    _, [[group]], _ = pack(entry(1, answer([1, 2, 3, 4], [-1e9, -np.inf, np.nan, -100.0], [0.0, -1.0, -1.0, -1e9])))
    [a] = group["answers"]
    assert a["engine"].tolist() == [65535, 65535, 0, 65535]
    assert a["gap"].tolist() == [20000, 20000, 20000, -20000]


def test_the_index_counts_what_filters_ask_for():
    agree, differ = {"a": "correct", "b": "correct"}, {"a": "wrong", "b": "correct"}
    index, _, _ = pack(
        entry(
            0,
            answer([1, 2], [-1, -1], None, verdict="wrong", fate="trained", grader_verdicts=differ),
            answer([1], [-1], None, finish="length", verdict="timeout", fate="ignored"),
            answer([1], [-1], None, verdict="correct", fate="trained", grader_verdicts=agree),
        ),
        entry(9, AnswerEntry("no tokens", 44, "stop", "unparseable", grader_verdicts={"a": "wrong", "b": "timeout"})),
    )
    assert index["groups"]["count"] == [3, 1]
    assert index["groups"]["rate"] == [0.5, 0.0]  # the ignored answer does not count
    assert index["groups"]["number"] == [0, 9]
    assert index["answers"]["length"] == [2, 1, 1, 44]
    assert [index["verdicts"][v] for v in index["answers"]["verdict"]] == ["wrong", "timeout", "correct", "unparseable"]
    assert [index["fates"][f] for f in index["answers"]["fate"]] == ["trained", "ignored", "trained", ""]
    assert index["answers"]["flags"] == [1, 2, 0, 0]  # wrong and timeout do not disagree: neither is correct


def test_large_runs_are_cut_into_chunks_that_the_index_finds():
    text = "x" * (CHUNK_BYTES // 4)
    entries = [QuestionEntry(0, n, "s", f"q{n}", "1", [AnswerEntry(text, 9, "stop", "wrong")]) for n in range(11)]
    index, chunks, _ = pack(*entries)
    assert len(chunks) == 3
    places = zip(index["groups"]["number"], index["groups"]["chunk"], index["groups"]["slot"])
    assert all(chunks[chunk][slot]["prompt"] == f"q{number}" for number, chunk, slot in places)


def test_formulas_of_prompts_answers_and_references_are_numbers():
    stream = io.BytesIO()
    packer = Packer(stream)
    packer.add(
        [
            QuestionEntry(0, 0, "s", "What is $x$?", "\\frac{1}{2}", [AnswerEntry("It is $x$.", 9, "stop", "wrong")]),
            QuestionEntry(0, 1, "s", "And?", "12", [AnswerEntry(r"\boxed{x}", 9, "stop", "wrong")]),
            QuestionEntry(0, 2, "s", "And?", "$x$ or 2", []),
        ]
    )
    index = packer.index()
    [[first, second, third]] = unpack(stream)
    assert first["prompt"] == ["What is ", 0, "?"]
    assert first["answer"] == [1]  # LaTeX without delimiters
    assert first["answers"][0]["text"] == ["It is ", 0, "."]
    assert (second["answer"], second["answers"][0]["text"]) == ("12", [[0]])
    assert third["answer"] == [0, " or 2"]
    [block] = read_elements(stream, "formulas")
    assert [source for source, _ in block] == ["x", "\\frac{1}{2}"]
    assert index["formulasPerBlock"] == 500
    assert index["groups"]["text"] == ["What is $x$?", "And?", "And?"]  # the list and the search show the source


def test_nothing_is_a_page_too():
    index, chunks, packer = pack()
    assert (chunks, packer.num_chunks, index["groups"]["count"]) == ([], 0, [])


def test_metrics_of_a_run_in_progress(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == ([], ["metrics.jsonl is not there yet"])
    lines = [
        '{"step": 0, "loss/total": 1.5, "correct_rate/hist": [1, 2]}',
        '{"step": 1, "loss/total": "nan"}',
        "garbage",
        '{"step": 1, "loss/total": 0.5, "eval/accuracy": 0.25}',  # done again after a resume
        '{"step": 2, "loss/to',
    ]
    path.write_text("\n".join(lines))
    records, notes = read_metrics(path)
    assert notes == ["metrics.jsonl, line 3: not a record with a step, left out"]
    assert to_columns(records) == {
        "step": [0, 1],
        "scalars": {"loss/total": [1.5, 0.5], "eval/accuracy": [None, 0.25]},
        "histograms": {"correct_rate/hist": [[1, 2], None]},
    }
    assert to_columns([{"step": 4, "a": "inf", "b": True, "c": 1}]) == {
        "step": [4], "scalars": {"c": [1]}, "histograms": {},
    }  # fmt: skip
