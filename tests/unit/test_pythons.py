"""The Pythons that pyproject.toml allows, beside the one that runs the tests.

Level 1 compiles every source file; level 2 runs what needs no torch. What needs torch is run on another Python by
giving `PYTHON=python3.12` to tests/run.sh.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("megatron_nft", "tools", "launch_slurm", "examples", "benchmarks", "tests")
OTHERS = [version for version in ("3.11", "3.12") if version != f"{sys.version_info.major}.{sys.version_info.minor}"]
REQUIREMENTS = (
    "antlr4-python3-runtime>=4.9.3,<=4.13.2,!=4.10.*,!=4.12.*",
    "httpx",
    "hypothesis",
    "math-verify==0.9.0",
    "numpy",
    "psutil",
    "pyarrow",
    "pydantic>=2.8,<3",
    "pytest",
    "pytest-timeout",
    "PyYAML",
    "rich",
)
"""Of the base requirements, those that the tests below need, and pytest's own."""
WITHOUT_TORCH = ("test_configs_algorithm", "test_files", "test_imports", "test_verify_maths", "test_verify_pool")


def interpreter(version: str) -> str:
    """A Python of that version: on the path, or pyenv's. Skips where there is none."""
    found = shutil.which(f"python{version}")
    works = found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0  # not a shim of nothing
    if works:
        return str(found)
    for path in sorted(Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python")):
        return str(path)
    pytest.skip(f"no Python {version} on the path or in pyenv")


@pytest.mark.parametrize("version", OTHERS)
def test_every_file_compiles(version, tmp_path):
    env = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    command = [interpreter(version), "-W", "error", "-m", "compileall", "-q", *FOLDERS]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.rglob("*.pyc"))) > 300


@pytest.mark.long
@pytest.mark.parametrize("version", OTHERS)
def test_what_needs_no_torch_passes(version, tmp_path):
    venv = tmp_path / "venv"
    subprocess.run([interpreter(version), "-m", "venv", str(venv)], check=True, timeout=300)
    python = str(venv / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True, timeout=900)
    (venv / "lib" / f"python{version}" / "site-packages" / "checkout.pth").write_text(f"{ROOT}\n")
    env = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path / "cache")}
    files = [f"tests/unit/{name}.py" for name in WITHOUT_TORCH]
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
