"""Every source file compiles on the Pythons that pyproject.toml allows. What runs on the other one, with the newer
megatron-core, tests/run.sh says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from other_python import find

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("megatron_nft", "tools", "launch_slurm", "examples", "benchmarks", "tests")
OTHERS = [version for version in ("3.11", "3.12") if version != f"{sys.version_info.major}.{sys.version_info.minor}"]


@pytest.mark.parametrize("version", OTHERS)
def test_every_file_compiles(version, tmp_path):
    python = find(version) or pytest.skip(f"no Python {version} on the path or in pyenv")
    env = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    command = [python, "-W", "error", "-m", "compileall", "-q", *FOLDERS]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.rglob("*.pyc"))) > 300
