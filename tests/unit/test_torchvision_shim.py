"""The operators that a torchvision needs whose compiled part does not load, and only that one (tools/engine_shims)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SHIMS = Path(__file__).resolve().parents[2] / "tools" / "engine_shims"
PROGRAM = """
import nft_torchvision_ops, torchvision, torch
try:
    print("declared", torch.ops.torchvision.nms.default)
except AttributeError:
    print("not declared")
"""


@pytest.mark.parametrize(
    ("compiled", "said"),
    [("loads", "not declared"), ("broken", "declared torchvision.nms.default"), ("missing", "declared")],
)
def test_operators_are_declared_where_the_compiled_part_does_not_load(tmp_path, compiled, said) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").touch()
    if compiled == "loads":  # any library does: what it declares is torchvision's matter
        shutil.copy(Path(torch.__file__).parent / "lib" / "libshm.so", package / "_C.so")
    elif compiled == "broken":
        (package / "_C.so").write_bytes(b"no library")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(SHIMS), str(tmp_path))), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(said), done.stdout
