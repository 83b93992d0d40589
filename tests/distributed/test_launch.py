"""The launcher: a failure of one rank is reported with its traceback, a hang is told apart, nothing stays running."""

import textwrap
import time
from pathlib import Path

from launch import distributed_checks, launch

test_inside_the_ranks = distributed_checks("ranks_launch.py", world_size=2, args=("one", "two"))

SCRIPT = """
import sys, time
sys.path.insert(0, {here!r})
import launch
from launch import run_checks

def check_before(ranks):
    pass

def check_one_rank_fails(ranks):
    if ranks.rank == 1:
        raise ValueError("only here")

def check_hangs(ranks):
    time.sleep({sleep})

if __name__ == "__main__":
    run_checks(globals())
"""


def test_a_failure_and_a_hang_are_told_apart(tmp_path: Path) -> None:
    script = tmp_path / "ranks_bad.py"
    script.write_text(textwrap.dedent(SCRIPT).format(here=str(Path(__file__).parent), sleep=600))
    start = time.monotonic()
    errors = launch(script, 2, (), timeout_s=20)
    assert time.monotonic() - start < 60
    assert errors["check_before"] == ""
    assert "rank 1" in errors["check_one_rank_fails"] and "only here" in errors["check_one_rank_fails"]
    assert "rank 0:" not in errors["check_one_rank_fails"]
    assert "check_hangs" not in errors and "killed after 20 s" in errors[""]
