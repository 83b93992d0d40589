"""The session on a GPU: order, limits, what cannot start, what was done before. Parts are small scripts here."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_session  # noqa: E402
from gpu_session import Part, Session  # noqa: E402


@pytest.fixture
def part(tmp_path):
    """Makes a part of a few lines; each also writes its name to order.txt."""

    def make(name: str, lines: str = "", needs: str = "", least_s: float = 0.1, together: str = "") -> Part:
        path = tmp_path / f"{name}.py"
        order = tmp_path / "order.txt"
        begin = f"with open({str(order)!r}, 'a') as f: f.write({name!r} + ' ')\n"
        path.write_text("import os, signal, sys, time\n" + begin + textwrap.dedent(lines))
        return Part(name, needs, least_s, (str(path),), together)

    return make


def works() -> list[str]:
    return [sys.executable, "-c", ""]


def order(folder: Path) -> list[str]:
    path = folder / "order.txt"
    return path.read_text().split() if path.exists() else []


def test_parts_run_in_their_order_and_are_done_once(part, tmp_path):
    parts = [part("a"), part("b"), part("c")]
    said = Session(tmp_path / "out", None).run(parts, {})
    assert [(name, what.split(",")[0]) for name, what in said] == [("a", "done"), ("b", "done"), ("c", "done")]
    assert order(tmp_path) == ["a", "b", "c"]
    again = Session(tmp_path / "out", None)  # the next call
    assert again.missing([*parts, part("d")]) == [part("d")]


def test_a_part_that_fails_is_named_with_its_last_line_and_the_next_one_runs(part, tmp_path):
    parts = [part("bad", "sys.exit('no such kernel')"), part("good")]
    session = Session(tmp_path / "out", None)
    said = dict(session.run(parts, {}))
    assert said["bad"].startswith("failed with 1")
    assert said["bad"].endswith(": no such kernel")
    assert said["good"].startswith("done")
    assert session.missing(parts) == parts[:1]  # tried again by the next call


def test_what_does_not_start_costs_the_parts_that_need_it_nothing(part, tmp_path):
    tries = []

    def broken() -> list[str]:
        tries.append(1)
        return [sys.executable, "-c", "raise ImportError('libcudnn is another one')"]

    parts = [part("one", needs="engine"), part("two", needs="engine"), part("three", needs="training")]
    said = dict(Session(tmp_path / "out", None).run(parts, {"engine": broken, "training": works}))
    assert said["one"] == said["two"] == ("left out: engine does not start: ImportError: libcudnn is another one")
    assert said["three"].startswith("done")
    assert len(tries) == 1
    assert order(tmp_path) == ["three"]


def test_a_check_that_hangs_is_ended(part, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_session, "CHECK_S", 0.5)
    hangs = {"engine": lambda: [sys.executable, "-c", "import time; time.sleep(1000)"]}
    said = Session(tmp_path / "out", None).run([part("one", needs="engine")], hangs)
    assert said == [("one", "left out: engine did not start within 0 s")]


def test_what_is_not_there_yet_is_said(part, tmp_path):
    def absent() -> list[str]:
        raise LookupError("SGLang is not there yet")

    said = Session(tmp_path / "out", None).run([part("one", needs="engine")], {"engine": absent})
    assert said == [("one", "left out: SGLang is not there yet")]


def test_at_the_limit_a_part_is_ended_with_all_that_it_started(part, tmp_path):
    pid = tmp_path / "pid"
    child = f"""
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        with open({str(pid)!r}, "w") as f: f.write(str(child.pid))
        time.sleep(1000)
    """
    parts = [part("long", child), part("later", least_s=30)]
    session = Session(tmp_path / "out", gpu_session.END_S + 8)
    said = dict(session.run(parts, {}))
    assert said["long"].startswith("ended at the limit")
    assert said["later"].startswith("not begun")
    assert session.missing(parts) == parts
    assert pid.exists()
    state = Path("/proc") / pid.read_text() / "stat"
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_parts_that_go_together_run_side_by_side(part, tmp_path):
    """Each waits for the other to have begun."""
    wait = f"""
        deadline = time.monotonic() + 60
        while len(open({str(tmp_path / "order.txt")!r}).read().split()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    """
    parts = [part("one", wait, together="tests"), part("two", wait, together="tests")]
    said = Session(tmp_path / "out", None).run(parts, {})
    assert all(what.startswith("done") for _, what in said)


def test_every_part_is_a_file_and_every_file_belongs_to_a_part():
    named = {argument for p in gpu_session.PARTS for argument in p.command if argument.endswith(".py")}
    named |= {f"benchmarks/gpu_{p.name}.py" for p in gpu_session.PIECES}
    files = {str(p.relative_to(ROOT)) for p in (ROOT / "benchmarks").glob("gpu_*.py")}
    files -= {f"benchmarks/gpu_{name}.py" for name in ("common", "servers", "session", "task")}
    files |= {str(p.relative_to(ROOT)) for p in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert named == files
    assert len({p.name for p in (*gpu_session.PARTS, *gpu_session.PIECES)}) == len(gpu_session.PARTS) + 5


def test_an_unknown_part_is_refused_and_nothing_is_begun(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_session.py"), "ceilings", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"OUT": str(tmp_path / "out")})
    assert done.returncode == 2
    assert "unknown part nonsense; parts: ceilings test_cudnn" in done.stderr
    assert not (tmp_path / "out").exists()


def test_done_parts_are_kept_on_disk(part, tmp_path):
    Session(tmp_path / "out", None).run([part("a")], {})
    assert json.loads((tmp_path / "out" / "done.json").read_text()) == ["a"]
