"""The engines' own environments, made where they are missing (tests/run.sh makes them beforehand)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

INSTALLER = Path(__file__).parents[1] / "tools" / "install_engine.sh"


def install(engine: str) -> None:
    """Makes the environment of `engine` ("sglang" or "vllm"), or finds it complete; AssertionError with the log."""
    done = subprocess.run(
        ["bash", str(INSTALLER), engine, "--python", sys.executable], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{INSTALLER} {engine}:\n{done.stdout}{done.stderr}"
