"""The rules of docs/testing.md: which tests may be tried again, and what a run leaves out."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
MAY_BE_TRIED_AGAIN = 10


def flaky_marks(source: str) -> list[tuple[str, ...]]:
    """The arguments of each `pytest.mark.flaky` in a file; none for a mark that is not called."""
    if "flaky" not in source:  # parsing hundreds of files met a rare fault of Python 3.11 (a SystemError of ast)
        return []
    tree = ast.parse(source)
    marks = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n).endswith("mark.flaky")]
    calls = {n.func: n for n in ast.walk(tree) if isinstance(n, ast.Call)}
    return [tuple(ast.literal_eval(a) for a in calls[m].args) if m in calls else () for m in marks]


def test_at_most_ten_tests_may_be_tried_again_and_each_says_why() -> None:
    marks = [
        (path.name, arguments)
        for path in sorted(TESTS.rglob("*.py"))
        for arguments in flaky_marks(path.read_text(encoding="utf-8"))
    ]
    without = [name for name, arguments in marks if not (len(arguments) == 1 and str(arguments[0]).strip())]
    assert not without, f"{without}: say why, as in pytest.mark.flaky('the reason')"
    assert len(marks) <= MAY_BE_TRIED_AGAIN


def test_no_two_test_files_have_one_name() -> None:
    """Test folders are no packages: pytest cannot collect both in one call, as level 2 does on the newer stack."""
    names = Counter(path.name for path in TESTS.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_marks_are_found() -> None:
    source = "@mark.flaky\ndef a(): ...\n@pytest.mark.flaky('slow disk')\ndef b(): ...\npytestmark = mark.flaky()"
    assert sorted(flaky_marks(source)) == [(), (), ("slow disk",)]


SUITE = """
import pathlib
import pytest

def fails_the_first_time(name):
    seen = pathlib.Path(__file__).with_name(name)
    if not seen.exists():
        seen.touch()
        raise AssertionError(f"first try of {name}")

def test_unmarked():
    fails_the_first_time("unmarked")

@pytest.mark.flaky("the disk")
def test_marked():
    fails_the_first_time("marked")

@pytest.mark.flaky("the disk")
def test_never_passes():
    raise AssertionError("whatever the disk does")

@pytest.mark.long
def test_long():
    pass
"""


@pytest.mark.parametrize(("level", "left_out"), [([], ", 1 deselected"), (["-m", ""], "")], ids=["one", "two"])
def test_only_marked_tests_are_tried_again_and_long_ones_are_asked_for(tmp_path, level, left_out) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    shutil.copy(TESTS / "conftest.py", tmp_path)
    shutil.copy(TESTS.parent / "pyproject.toml", tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *level, "test_suite.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert f"2 failed, {1 if left_out else 2} passed{left_out} in" in done.stdout, done.stdout
    for name in ("test_unmarked", "test_never_passes"):
        assert f"FAILED test_suite.py::{name}" in done.stdout
    assert "test_marked failed and is tried once more (the disk)" in done.stdout
    assert "first try of marked" in done.stdout
