"""tools/setup_env.sh with a stand-in for Python: what it asks pip for. And what docs/cluster.md says to type."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from megatron_nft.policy.stack import TESTED, Stack, check_stack

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/bin/sh
# Stands for python3.12 with a torch for CUDA $CUDA; writes what pip is asked for, and the constraints, to $ASKED.
case "$*" in
*"-m venv --help"* | *ensurepip*) ;;
*"-m venv"*) for folder; do :; done; mkdir -p "$folder/bin"; cp "$0" "$folder/bin/python" ;;
*python_version*) echo 3.12.3 ;;
*torch.version.cuda*) echo "$CUDA" ;;
*"-m pip"*)
  echo "$*" >>"$ASKED"
  before=
  for argument; do [ "$before" = --constraint ] && cat "$argument" >"$ASKED.constraints"; before=$argument; done ;;
esac
"""


def set_up(tmp_path: Path, cuda: str, *extras: str, **variables: str) -> tuple[int, str, str, str]:
    """(exit status, stderr, the last call of pip, the constraints)."""
    checkout, python, asked = tmp_path / "checkout", tmp_path / "python", tmp_path / "asked"
    (checkout / "tools").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "tools/setup_env.sh", "tools/torch_index.sh"):
        shutil.copy(ROOT / name, checkout / name)
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), "CUDA": cuda, "ASKED": str(asked)}
    environment |= {"NFT_TORCH_INDEX": "https://index.example", **variables}
    command = ["bash", str(checkout / "tools" / "setup_env.sh"), *extras]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    constraints = asked.with_name("asked.constraints")
    told = constraints.read_text() if constraints.exists() else ""
    return done.returncode, done.stderr, asked.read_text().splitlines()[-1], told


def test_transformer_engine_is_compiled_against_the_torch_that_is_there(tmp_path):
    pins = {"TORCH_VERSION": "2.11.0", "MEGATRON_CORE_VERSION": "0.16.1", "TRANSFORMER_ENGINE_VERSION": "2.11.0"}
    status, error, call, constraints = set_up(tmp_path, "13", "te", **pins)
    assert status == 0, error
    words = call.split()
    assert "--no-build-isolation" in words and "transformer-engine[core_cu13,pytorch]" in words
    assert words[words.index("--editable") + 1] == ".[te]"
    assert constraints.split() == ["torch==2.11.0", "megatron-core==0.16.1", "transformer-engine==2.11.0"]


def test_without_the_extra_nothing_of_it_is_asked_for(tmp_path):
    status, error, call, constraints = set_up(tmp_path, "", "dev")
    assert status == 0, error
    assert "transformer-engine" not in call and "--no-build-isolation" not in call
    assert constraints == "torch==2.13.0\n"


def test_transformer_engine_without_cuda_is_refused(tmp_path):
    status, error, call, _ = set_up(tmp_path, "", "te")
    assert status == 1 and "the extra te needs a torch with CUDA" in error
    assert "torch==2.13.0" in call.split(), "torch itself was the last that pip was asked for"


def test_the_commands_of_the_guide_make_the_environment_that_a_gpu_has_run():
    """Step 2 of docs/cluster.md: a start with these versions does not warn, and they are the row of tests/gpu."""
    text = (ROOT / "docs" / "cluster.md").read_text()
    (command,) = re.findall(r"^ +((?:\w+=\S+ [\s\\]*)+bash tools/setup_env\.sh te)$", text, re.MULTILINE)
    pins = dict(word.split("=", 1) for word in shlex.split(command.replace("\\\n", " ")) if "=" in word)
    python = pins["PYTHON"].removeprefix("python")
    versions = (pins["MEGATRON_CORE_VERSION"], pins["TORCH_VERSION"], pins["TRANSFORMER_ENGINE_VERSION"])
    stack = Stack(f"{python}.0", *versions)
    assert check_stack(stack) is None
    (row,) = (tested for tested in TESTED if tested.covers(stack))
    assert row.how.startswith("tests/gpu")
