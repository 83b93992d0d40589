"""SmolLM2-135M-Instruct for the tests, made once from its PyPI package and kept in build/smollm2."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "smollm2_digits"
FOLDER = ROOT / "build" / "smollm2" / "model"


@cache
def model_folder() -> Path:
    """The model's folder; skips the test, with the reason, where the package cannot be had."""
    command = [sys.executable, str(EXAMPLE / "fetch.py"), str(FOLDER)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["fetch.py gave no reason"])[-1]
        if "cannot be downloaded" not in reason:
            raise AssertionError(f"{EXAMPLE / 'fetch.py'}:\n{done.stderr}")
        pytest.skip(reason)
    return FOLDER
