"""Files and folders written whole or not at all, their digests, and rows of JSONL and parquet."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_nft import files
from megatron_nft.files import RowsError, publish_folder, read_rows, replacing, sha256_of_file, write_atomically


def test_text_and_bytes_take_the_place_of_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, "é \ud800\n")
    assert path.read_bytes() == b"\xc3\xa9 ?\n"
    write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyError), replacing(path) as file:
        file.write(b"half")
        assert path.read_text() == "old"
        raise KeyError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_content_is_flushed_before_the_name_and_the_folder_after_it(tmp_path, monkeypatch):
    path, events = tmp_path / "a.txt", []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        events.append("folder" if target == str(tmp_path) else f"file of {os.fstat(descriptor).st_size} bytes")
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", record_fsync)
    monkeypatch.setattr(files.os, "replace", lambda old, new: (events.append("rename"), replace(old, new)))
    write_atomically(path, "12345")
    assert events == ["file of 5 bytes", "rename", "folder"]


def test_a_killed_writer_leaves_a_hidden_file_only(tmp_path):
    code = (
        "import os, pathlib, sys; from megatron_nft.files import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.json")], timeout=120, check=False)
    assert done.returncode == -9
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".a.json.") and left.name.endswith(".partial")
    assert list(tmp_path.glob("*.json")) == []


def test_digest_counts_the_bytes_that_it_reads(tmp_path):
    path, counts = tmp_path / "a.bin", []
    content = bytes(range(256)) * 4100  # a little more than one block
    path.write_bytes(content)
    assert len(content) > files.BLOCK_BYTES
    assert sha256_of_file(path, counts.append) == hashlib.sha256(content).hexdigest()
    assert sum(counts) == len(content) and len(counts) == 2
    path.write_bytes(b"")
    assert sha256_of_file(path) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_jsonl_rows_keep_their_line_numbers(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": "x\xe2\x80\xa8y"}\r\n{"a": null}')
    assert list(read_rows(path)) == [(1, {"a": 1}), (4, {"a": "x\u2028y"}), (5, {"a": None})]


def test_integers_that_python_cannot_read_stay_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": ' + "9" * 5000 + ', "b": 12}\n')
    assert list(read_rows(path)) == [(1, {"a": "9" * 5000, "b": 12})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": "b"}\n{"a": "\xe9"}\n', r"a\.jsonl, row 2: not UTF-8 text \(byte 18\)"),
        (b'{"a": "b"}\n{"a": \n', r"a\.jsonl, row 2: not JSON \(Expecting value at character 7\)"),
        (b"[" * 100000, r"row 1: not JSON \(nested too deeply\)"),
        (b"[1]\n", "row 1: a list, not an object"),
        (b"null\n", "row 1: a NoneType, not an object"),
    ],
)
def test_jsonl_that_cannot_be_read_names_file_and_row(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(RowsError, match=message):
        list(read_rows(path))


def _folder(path, content):
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "a.txt").write_text(content)
    return path


def _folders(root):
    return {p.name: (p / "inner" / "a.txt").read_text() for p in root.iterdir()}


@pytest.mark.parametrize("present", [{}, {"out": "old"}, {"out.old": "older"}, {"out": "old", "out.old": "older"}])
def test_a_folder_takes_its_name_and_what_had_it_is_removed(tmp_path, present):
    for name, content in present.items():
        _folder(tmp_path / name, content)
    publish_folder(_folder(tmp_path / "out.partial", "new"), tmp_path / "out")
    assert _folders(tmp_path) == {"out": "new"}


@pytest.mark.parametrize("present", [{"out": "old"}, {"out.old": "old"}, {"out": "old", "out.old": "older"}])
def test_a_whole_folder_stands_at_every_step_and_is_on_disk_before_it_has_the_name(tmp_path, monkeypatch, present):
    for name, content in present.items():
        _folder(tmp_path / name, content)
    partial, events = _folder(tmp_path / "out.partial", "new"), []

    def watch(owner, name):
        original = getattr(owner, name)

        def watched(first, *others):
            target = Path(os.readlink(f"/proc/self/fd/{first}") if name == "fsync" else first)
            events.append(f"{name} {target.relative_to(tmp_path)}")
            found = _folders(tmp_path)
            assert found.get("out", "new") in ("old", "new") and "old" in (found.get("out"), found.get("out.old"))
            assert found.get("out") == "new" or found["out.partial"] == "new"
            original(first, *others)

        monkeypatch.setattr(owner, name, watched)

    watch(files.os, "fsync")
    watch(files.os, "rename")
    publish_folder(partial, tmp_path / "out")
    flushed = [f"fsync out.partial{rest}" for rest in ("/inner/a.txt", "/inner", "")]
    renamed = ["rename out"] * ("out" in present) + ["rename out.partial"]
    assert events == [*flushed, *renamed, "fsync ."]
    assert _folders(tmp_path) == {"out": "new"}


def test_a_folder_that_cannot_get_the_name_leaves_it_to_the_old_one(tmp_path, monkeypatch):
    _folder(tmp_path / "out", "old")
    partial, rename = _folder(tmp_path / "out.partial", "new"), os.rename

    def refuse(source, target):
        if source == partial:
            raise OSError("Stale file handle")
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", refuse)
    with pytest.raises(OSError, match="Stale"):
        publish_folder(partial, tmp_path / "out")
    assert _folders(tmp_path) == {"out": "old", "out.partial": "new"}


def test_files_that_cannot_be_read_are_named(tmp_path):
    for name, message in {
        "none.jsonl": r"none\.jsonl: cannot be read \(No such file",
        "none.parquet": r"none\.parquet: cannot be read as parquet",
        "a.csv": r"end in \.jsonl or \.parquet, not in '\.csv'",
        "a": "not in 'nothing'",
    }.items():
        with pytest.raises(RowsError, match=message):
            list(read_rows(tmp_path / name))


def test_parquet_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BATCH_ROWS", 2)
    rows = [{"a": i, "b": [{"c": str(i)}]} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet")) == list(enumerate(rows, start=1))


def test_invalid_text_is_refused_or_replaced(tmp_path):
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_bytes(b'{"a": "x\xff"}\n')
    raw = pa.array([b"x\xff", None], pa.binary())
    pq.write_table(pa.table({"a": raw.view(pa.string()), "b": raw}), table)
    assert list(read_rows(lines, replace_invalid_text=True)) == [(1, {"a": "x\ufffd"})]
    assert list(read_rows(table, replace_invalid_text=True)) == [
        (1, {"a": "x\ufffd", "b": "x\ufffd"}),
        (2, {"a": None, "b": None}),
    ]
    for path in (lines, table):
        with pytest.raises(RowsError, match=r"utf-8|UTF-8"):
            list(read_rows(path))


def test_it_needs_no_heavy_package():
    code = "import json, sys, megatron_nft.files; print(json.dumps([m for m in sys.modules]))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert not {"torch", "pyarrow", "huggingface_hub"} & set(loaded)
