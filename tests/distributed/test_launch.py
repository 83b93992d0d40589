"""The launcher: a failure of one rank is reported with its traceback, a hang is told apart, nothing stays running."""

import os
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import launch
from processes import below

test_inside_the_ranks = launch.distributed_checks("ranks_launch.py", world_size=2, args=("one", "two"))

SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
from launch import run_checks

def check_before(ranks):
    pass

def check_one_rank_fails(ranks):
    if ranks.rank == 1:
        raise ValueError("only here")

def check_hangs(ranks):
    Path(ranks.args[0], f"hangs-{{ranks.rank}}").touch()
    time.sleep(600)

if __name__ == "__main__":
    run_checks(globals())
"""


def test_a_failure_and_a_hang_are_told_apart(tmp_path: Path, monkeypatch) -> None:
    """The time is over as soon as both ranks hang."""

    def clock() -> float:
        return time.monotonic() + 1000 * len(list(tmp_path.glob("hangs-*")))

    monkeypatch.setattr(launch, "time", SimpleNamespace(monotonic=clock, sleep=time.sleep))
    script = tmp_path / "ranks_bad.py"
    script.write_text(textwrap.dedent(SCRIPT).format(here=str(Path(__file__).parent)))
    before = below(os.getpid())
    errors = launch.launch(script, 2, (str(tmp_path),), timeout_s=1500)
    assert not below(os.getpid()) - before - launch.kept_running()
    assert errors["check_before"] == ""
    assert "rank 1" in errors["check_one_rank_fails"] and "only here" in errors["check_one_rank_fails"]
    assert "rank 0:" not in errors["check_one_rank_fails"]
    assert "check_hangs" not in errors and "killed after 1500 s" in errors[""]
