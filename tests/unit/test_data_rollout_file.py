"""Rollout files: everything written comes back, whole files only."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_nft.data.rollout_file import (
    SCHEMA,
    RolloutFileError,
    list_rollout_files,
    prompt_text,
    read_rollout_file,
    rollout_path,
    write_rollouts,
)
from megatron_nft.types import Prompt, Rollout, RolloutGroup, Verdict


def make_prompt(index=3, content="1+1=", answer="2"):
    ids = np.array([5, 6, 7], dtype=np.int32)
    return Prompt(index, "sums", ({"role": "user", "content": content},), answer, ids)


def make_group(draw=0, *, text="\\boxed{2}", trainer=True):
    rollouts = [
        Rollout(
            draw=draw,
            sample_index=k,
            response_ids=np.array([9, 8, 7][: k + 1], dtype=np.int32),
            rollout_logprobs=np.array([-0.5, -0.25, -2.0][: k + 1], dtype=np.float32),
            finish_reason="stop",
            weight_version=4,
            text=text,
            verdict=Verdict.CORRECT if k == 0 else Verdict.WRONG,
            extracted="2",
            grader_verdicts={"a": Verdict.CORRECT, "b": Verdict.WRONG} if k == 0 else {"a": Verdict.WRONG},
            verify_s=0.125,
            ignored=k == 2,
            trainer_logprobs=np.array([-0.5, -0.5, -0.5][: k + 1], dtype=np.float32) if trainer else None,
        )
        for k in range(3)
    ]
    return RolloutGroup(draw, make_prompt(), rollouts, step=11)


def test_rows_come_back_as_they_were_written(tmp_path):
    path = rollout_path(tmp_path, 12, 1)
    assert path == tmp_path / "rollouts" / "step_000012" / "rank_00001.parquet"
    assert write_rollouts(path, [make_group(4), make_group(9, trainer=False)], ["trained", "surplus"], step=12) == 6
    assert list_rollout_files(tmp_path) == [(12, path)]
    table = read_rollout_file(path)
    assert table.schema.names == SCHEMA.names
    rows = table.to_pylist()
    assert [(r["draw"], r["sample_index"]) for r in rows] == [(4, 0), (4, 1), (4, 2), (9, 0), (9, 1), (9, 2)]
    assert [r["fate"] for r in rows] == ["trained", "trained", "ignored", "surplus", "surplus", "ignored"]
    first = rows[0]
    assert first["step"] == 12
    assert first["prompt_ids"] == [5, 6, 7]
    assert first["response_ids"] == [9]
    assert rows[1]["rollout_logprobs"] == [-0.5, -0.25]
    assert rows[1]["trainer_logprobs"] == [-0.5, -0.5]
    assert rows[3]["trainer_logprobs"] is None
    assert first["verdict"] == "correct"
    assert json.loads(first["grader_verdicts"]) == {"a": "correct", "b": "wrong"}
    assert rows[1]["grader_verdicts"] is None  # one grader says nothing beyond the verdict
    assert first["correct_rate"] == 0.5  # the ignored third answer does not count
    assert (first["weight_version"], first["prompt_index"], first["answer"]) == (4, 3, "2")


def test_text_that_utf8_cannot_hold_keeps_its_row(tmp_path):
    path = tmp_path / "rank_00000.parquet"
    write_rollouts(path, [make_group(text="broken \ud800 end")], ["trained"], step=0)
    assert read_rollout_file(path).column("text")[0].as_py() == "broken ? end"


def test_an_empty_step_is_a_file_without_rows(tmp_path):
    path = rollout_path(tmp_path, 0, 0)
    assert write_rollouts(path, [], [], step=0) == 0
    assert read_rollout_file(path).num_rows == 0


def test_unfinished_files_are_not_read_and_leave_nothing(tmp_path, monkeypatch):
    path = rollout_path(tmp_path, 1, 0)

    def broken(*args, **kwargs):
        args[1].write(b"PAR1 half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", broken)
    with pytest.raises(OSError, match="No space"):
        write_rollouts(path, [make_group()], ["trained"], step=1)
    assert list(path.parent.iterdir()) == []
    (path.parent / ".rank_00000.parquet.99.partial").write_bytes(b"half")  # a killed writer's
    assert list_rollout_files(tmp_path) == []


def test_files_are_listed_by_step_then_rank(tmp_path):
    for step, rank in [(10, 0), (2, 1), (2, 0)]:
        write_rollouts(rollout_path(tmp_path, step, rank), [make_group()], ["trained"], step=step)
    (tmp_path / "rollouts" / "notes").mkdir()
    assert [(s, p.name) for s, p in list_rollout_files(tmp_path)] == [
        (2, "rank_00000.parquet"), (2, "rank_00001.parquet"), (10, "rank_00000.parquet"),
    ]  # fmt: skip
    assert read_rollout_file(rollout_path(tmp_path, 10, 0), columns=["text"]).schema.names == ["text"]


def test_damaged_and_foreign_files_are_named(tmp_path):
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(RolloutFileError, match=r"damaged\.parquet.*cannot be read"):
        read_rollout_file(damaged)
    foreign = tmp_path / "foreign.parquet"
    pq.write_table(pa.table({"step": [1], "text": ["x"]}), foreign)
    with pytest.raises(RolloutFileError, match=r"foreign\.parquet: no column draw"):
        read_rollout_file(foreign)


def test_fates_are_checked(tmp_path):
    with pytest.raises(ValueError, match="unknown fate 'kept'"):
        write_rollouts(tmp_path / "x.parquet", [make_group()], ["kept"], step=0)
    with pytest.raises(ValueError, match="1 rollout groups but 2 fates"):
        write_rollouts(tmp_path / "x.parquet", [make_group()], ["trained"] * 2, step=0)
    assert list(tmp_path.iterdir()) == []


def test_prompt_text_shows_roles_only_where_there_are_several():
    assert prompt_text(make_prompt(content="What?")) == "What?"
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"})
    chat = Prompt(0, "s", messages, "1", np.zeros(1, np.int32))
    assert prompt_text(chat) == "[system]\nBe brief.\n\n[user]\nWhat?"
