"""A folder has one writer, with flock and without."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_nft import locks
from megatron_nft.locks import FolderInUseError, hold_folder

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import errno, fcntl, sys
from pathlib import Path
from megatron_nft import locks
def broken(*_):
    raise OSError(errno.EOPNOTSUPP, "no flock here")
if sys.argv[2] == "lease":
    locks.fcntl.flock = broken
held = locks.hold_folder(Path(sys.argv[1]))
print(held.kind, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def no_flock(monkeypatch):
    """A file system without flock, and a lease that is given up after a second."""

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    monkeypatch.setattr(locks, "RENEW_S", 0.1)
    monkeypatch.setattr(locks, "GIVEN_UP_S", 1.0)


def holder(folder: Path, kind: str) -> subprocess.Popen:
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLDER, str(folder), kind]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout.readline() == f"{kind}\n"
    return process


@pytest.mark.parametrize("kind", ["flock", "lease"])
def test_another_process_holds_it(tmp_path, kind, request, monkeypatch):
    other = holder(tmp_path, kind)
    try:
        if kind == "lease":
            request.getfixturevalue("no_flock")
            monkeypatch.setattr(locks, "GIVEN_UP_S", 60.0)  # its holder, in another process, renews it every 5 s
        with pytest.raises(FolderInUseError, match=f"{tmp_path} is in use by"):
            hold_folder(tmp_path)
        other.kill()
        other.wait()
        monkeypatch.setattr(locks, "GIVEN_UP_S", 1.0)
        with hold_folder(tmp_path) as held:
            assert held.kind == kind
    finally:
        other.kill()
        other.communicate()


def test_a_lease_of_another_host(tmp_path, no_flock):
    """Taken over only once it is not renewed any more."""
    lease = tmp_path / ".lease"
    lease.write_text("elsewhere 1 abc\n")
    with hold_folder(tmp_path) as held:
        assert held.kind == "lease" and lease.read_text().startswith(f"{os.uname().nodename} {os.getpid()} ")
        with pytest.raises(FolderInUseError, match=rf"in use by process {os.getpid()} of"):
            hold_folder(tmp_path)  # it is renewed while we look
    assert not lease.exists()


def test_a_lease_that_was_taken_over_is_not_removed(tmp_path, no_flock):
    held = hold_folder(tmp_path)
    (tmp_path / ".lease").write_text("elsewhere 1 abc\n")
    held.close()
    assert (tmp_path / ".lease").read_text() == "elsewhere 1 abc\n"


def test_other_errors_are_not_taken_for_a_missing_flock(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"):
        hold_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        hold_folder(tmp_path / "none")
