"""Prints a Python 3.12 that can be used beside the one that runs this; where there is none, says so and ends with 1."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

NEWER = "3.12"


def find(version: str) -> str | None:
    """A Python of that version: on the path, or pyenv's."""
    found = shutil.which(f"python{version}")
    if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:  # not a shim of nothing
        return found
    paths = sorted(Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python"))
    return str(paths[-1]) if paths else None


if __name__ == "__main__":
    if sys.version_info[:2] >= tuple(map(int, NEWER.split("."))):
        print(f"newer stack: the tests run on Python {sys.version.split()[0]} anyway")
        sys.exit(1)
    other = find(NEWER)
    print(other or f"newer stack: no Python {NEWER} on the path or in pyenv; nothing was run on it")
    sys.exit(other is None)
