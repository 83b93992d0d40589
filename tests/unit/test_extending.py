"""The code of docs/extending.md runs as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "extending.md"
SECTIONS = (
    "A loss",
    "A model family",
    "An engine",
    "A grader",
    "A choice of questions",
    "A metric",
    "A prompt format",
)
BLOCK = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", re.M | re.S)
MAX_LINES = {"An engine": 75}
SCREEN_LINES = 45  # of code and text between two headings, blank lines left out


def sections() -> dict[str, str]:
    """Heading -> text below it."""
    parts = re.split(r"^## (.+)\n", PAGE.read_text(encoding="utf-8"), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_page_has_its_sections():
    assert tuple(sections()) == SECTIONS


@pytest.mark.parametrize("heading", SECTIONS)
def test_a_section_fits_on_a_screen(heading):
    lines = [line for line in sections()[heading].splitlines() if line.strip()]
    assert len(lines) <= MAX_LINES.get(heading, SCREEN_LINES)


@pytest.mark.parametrize("heading", SECTIONS)
def test_the_code_runs(heading, tmp_path):
    blocks = BLOCK.findall(sections()[heading])
    programs = []
    for language, name, code in blocks:
        if name:
            (tmp_path / name).write_text(code.rstrip("\n") + "\n" * (language != "jinja"), encoding="utf-8")
        else:
            assert language == "python"
            programs.append(code)
    assert len(programs) == 1 and "assert" in programs[0]
    (tmp_path / "program.py").write_text(programs[0], encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT / "tests"))), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
