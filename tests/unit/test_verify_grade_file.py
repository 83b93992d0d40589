"""`megatron-nft grade`: every row comes back with a verdict, in its place, whatever is in it."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import wait_until

from megatron_nft import files
from megatron_nft.data.rollout_file import rollout_path, write_rollouts
from megatron_nft.types import Prompt, Rollout, RolloutGroup, Verdict
from megatron_nft.verify import command

HERE = Path(__file__).parent


def run(source: Path, target: Path, *options: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(["--input", str(source), "--output", str(target), "--workers", "1", *options]))


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_rows_keep_order_and_columns(tmp_path, capsys):
    rows = [{"id": i, "response": f"\\boxed{{{i % 3}}}", "answer": "1", "note": {"a": [i]}} for i in range(200)]
    source, target = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert run(source, target) == 0
    graded = read_jsonl(target)
    assert [{key: row[key] for key in rows[0]} for row in graded] == rows
    assert [row["verdict"] for row in graded] == ["correct" if i % 3 == 1 else "wrong" for i in range(200)]
    assert [row["extracted"] for row in graded] == [str(i % 3) for i in range(200)]
    assert {row["grader"] for row in graded} == {"maths"}
    assert all(0 <= row["seconds"] < 60 for row in graded)
    shown = capsys.readouterr().out
    assert "correct" in shown
    assert "33.5%" in shown  # 67 of 200
    assert set(os.listdir(tmp_path)) == {"in.jsonl", "out.jsonl"}


def test_bad_rows_are_counted_and_none_is_lost(tmp_path, capsys):
    lines = [
        b'{"response": "\\\\boxed{5}", "answer": "5"}',
        b'{"response": null, "answer": "5"}',
        b'{"answer": "5"}',
        b'{"response": 5, "answer": "5"}',
        b'{"response": "\\\\boxed{5}", "answer": null}',
        b'{"response": "\\\\boxed{5}", "answer": ""}',
        b'{"response": "\\\\boxed{5}", "answer": 5}',
        b'{"response": "\\\\boxed{27}", "answer": 27.0}',
        b'{"response": "\\\\boxed{3, 1}", "answer": ["1", "3"]}',
        b'{"response": "\\\\boxed{5}", "answer": {"ground_truth": "5"}}',
        b'{"response": "\xff\xfe \\\\boxed{5}", "answer": "5"}',
        b'{"response": "\\\\boxed{\\ud800}", "answer": "5"}',
        b'{"response": "", "answer": "5"}',
        b"",
        b'{"response": "\\\\boxed{5}", "answer": NaN}',
        b'{"response": "\\\\boxed{true}", "answer": true}',
        b'{"response": "\\\\boxed{5}", "answer": ' + b"7" * 10_001 + b"}",
    ]
    expected = (
        "correct unparseable unparseable unparseable unparseable unparseable correct correct correct unparseable "
        "correct unparseable unparseable unparseable correct unparseable"
    )
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\n".join(lines) + b"\n")
    assert run(source, target) == 0
    graded = read_jsonl(target)
    assert " ".join(row["verdict"] for row in graded) == expected
    assert graded[1]["reason"] == "the response is null, not text"
    assert graded[4]["reason"] == "the reference answer is null"
    assert graded[9]["reason"] == "the reference answer is a dict"
    assert "the response is null" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"response": "a", "answer": "b"}\n{"response": \n', "row 2: not JSON"),
        (b"[1, 2]\n", "row 1: a list, not an object"),
        (
            b'{"respons": "a", "answer": "b"}\n',
            "'response' (or 'text') is missing; columns found: 'respons', 'answer'",
        ),
        (b'{"response": "a", "gold": "b"}\n', "column 'answer' is missing"),
        (b'{"response": ' + b"[" * 100000 + b"\n", "row 1: not JSON"),
    ],
)
def test_files_that_cannot_be_graded(tmp_path, capsys, content, message):
    source = tmp_path / "in.jsonl"
    source.write_bytes(content)
    assert run(source, tmp_path / "out.jsonl") == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out.jsonl").exists()


def test_paths_and_graders_that_do_not_exist(tmp_path, capsys):
    source = write_jsonl(tmp_path / "in.jsonl", [{"response": "1", "answer": "1"}])
    assert run(tmp_path / "none.jsonl", tmp_path / "out.jsonl") == 1
    assert run(source, source) == 1
    assert run(source, tmp_path / "out.csv") == 1
    assert run(source, tmp_path / "no" / "out.jsonl") == 1
    assert run(source, tmp_path / "out.jsonl", "--grader", "nope") == 2
    assert run(source, tmp_path / "out.jsonl", "--grader", "no_such_module.f") == 1
    errors = capsys.readouterr().err
    for text in ("No such file", "the same file", "'.csv'", "unknown grader 'nope'", "cannot import no_such_module"):
        assert text in errors
    with pytest.raises(SystemExit):
        run(source, tmp_path / "out.jsonl", "--workers", "0")


def test_an_empty_file(tmp_path):
    (tmp_path / "in.jsonl").write_text("")
    assert run(tmp_path / "in.jsonl", tmp_path / "out.jsonl") == 0
    assert (tmp_path / "out.jsonl").read_text() == ""


def test_parquet_keeps_its_types(tmp_path):
    table = pa.table(
        {
            "text": pa.array(["\\boxed{5}", None, "\\boxed{6}"]),
            "answer": pa.array([5, 5, 5], pa.int16()),
            "logprobs": pa.array([[0.5], [], None], pa.list_(pa.float32())),
            "verdict": pa.array(["old", "old", "old"]),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    assert run(tmp_path / "in.parquet", tmp_path / "out.parquet") == 0
    graded = pq.read_table(tmp_path / "out.parquet")
    assert graded.column("verdict").to_pylist() == ["correct", "unparseable", "wrong"]
    for name in ("text", "answer", "logprobs"):
        assert graded.column(name).equals(table.column(name))
    assert graded.schema.field("logprobs").type == pa.list_(pa.float32())


def test_the_projects_own_rollout_files(tmp_path):
    prompt = Prompt(7, "sums", ({"role": "user", "content": "1 + 1?"},), "2", np.arange(3, dtype=np.int32))
    rollouts = [
        Rollout(
            draw=4,
            sample_index=k,
            response_ids=np.arange(2, dtype=np.int32),
            rollout_logprobs=np.zeros(2, dtype=np.float32),
            finish_reason="stop",
            weight_version=3,
            text=text,
            verdict=Verdict.WRONG,
        )
        for k, text in enumerate(("\\boxed{2}", "\\boxed{3}"))
    ]
    source = rollout_path(tmp_path, step=5, rank=0)
    write_rollouts(source, [RolloutGroup(4, prompt, rollouts, 5)], ["trained"], step=5)
    assert run(source, tmp_path / "out.parquet") == 0
    graded = pq.read_table(tmp_path / "out.parquet")
    assert graded.column("verdict").to_pylist() == ["correct", "wrong"]  # in place of the old ones
    assert graded.column("text").equals(pq.read_table(source).column("text"))


def test_parquet_with_invalid_utf8(tmp_path):
    broken = pa.array([b"\xff \\boxed{5}", b"\\boxed{6}"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"response": broken, "answer": ["5", "5"]}), tmp_path / "in.parquet")
    assert run(tmp_path / "in.parquet", tmp_path / "out.jsonl") == 0
    assert [row["verdict"] for row in read_jsonl(tmp_path / "out.jsonl")] == ["correct", "wrong"]


def test_jsonl_to_parquet_with_mixed_types(tmp_path):
    rows = [{"response": "\\boxed{5}", "answer": 5}, {"response": "\\boxed{5}", "answer": "5", "more": {"a": 1}}]
    assert run(write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.parquet") == 0
    graded = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["verdict"] for row in graded] == ["correct", "correct"]
    assert [row["answer"] for row in graded] == ["5", "5"]


def test_a_truncated_parquet_file(tmp_path, capsys):
    pq.write_table(pa.table({"response": ["a"] * 1000, "answer": ["b"] * 1000}), tmp_path / "in.parquet")
    data = (tmp_path / "in.parquet").read_bytes()
    (tmp_path / "in.parquet").write_bytes(data[: len(data) // 2])
    assert run(tmp_path / "in.parquet", tmp_path / "out.parquet") == 1
    assert "cannot be read as parquet" in capsys.readouterr().err


def test_several_graders(tmp_path, capsys):
    rows = [{"response": r, "answer": "1/2"} for r in ("\\boxed{1/2}", "\\boxed{0.5}", "\\boxed{2}", "no box here")]
    source, target = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert run(source, target, "--grader", "maths,dapo_boxed") == 0
    graded = read_jsonl(target)
    assert [row["verdict"] for row in graded] == ["correct", "correct", "wrong", "unparseable"]
    assert [row["graders_disagree"] for row in graded] == [False, True, False, False]
    assert json.loads(graded[1]["grader_verdicts"]) == {"maths": "correct", "dapo_boxed": "wrong"}
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 of 4 rows are correct for one grader and not for another" in shown
    assert "maths (down), dapo_boxed (across)" in shown
    assert "│ 2 │ correct" in shown  # the row on which they disagree


def test_a_killed_command_goes_on_where_it_was(tmp_path):
    """Killed while row 200 keeps its one worker busy."""
    go = tmp_path / "go"
    rows = [{"response": "sleep 0.01" if index % 2 else "yes", "answer": "yes"} for index in range(400)]
    rows[200] = {"response": f"until {go}", "answer": f"until {go}"}
    source, target = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    journal = tmp_path / "out.jsonl.journal"
    command = [sys.executable, "-m", "megatron_nft", "grade", "--input", str(source), "--output", str(target)]
    command += ["--grader", "verify_graders.act", "--workers", "1", "--timeout-s", "600"]
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 20, what="the first verdicts")
        finally:
            process.kill()
    assert not target.exists()
    graded_before = journal.read_bytes().count(b"\n") - 1
    assert 0 < graded_before <= 200
    go.touch()
    with journal.open("ab") as file:  # as if the kill had cut a line
        file.write(b'{"verdict": "corr')
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert f"going on after row {graded_before} of 400" in " ".join(done.stdout.split())
    assert [row["verdict"] for row in read_jsonl(target)] == ["wrong" if i % 2 else "correct" for i in range(400)]
    assert not journal.exists()


def test_a_journal_of_another_input_is_not_used(tmp_path):
    target = tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.journal").write_text('{"input": [1, "0"]}\n{"verdict": "correct"}\n')
    source = write_jsonl(tmp_path / "in.jsonl", [{"response": "\\boxed{2}", "answer": "1"}])
    assert run(source, target) == 0
    assert [row["verdict"] for row in read_jsonl(target)] == ["wrong"]


def test_a_full_disk_leaves_the_old_output(tmp_path, monkeypatch, capsys):
    source = write_jsonl(tmp_path / "in.jsonl", [{"response": "\\boxed{1}", "answer": "1"}])
    target = tmp_path / "out.jsonl"
    target.write_text("old\n")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    assert run(source, target) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert target.read_text() == "old\n"
    monkeypatch.undo()
    assert run(source, target) == 0
    assert set(os.listdir(tmp_path)) == {"in.jsonl", "out.jsonl"}
