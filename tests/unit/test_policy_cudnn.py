"""Of two cuDNNs on a machine, Transformer Engine gets the one that torch brings; shown with stand-ins for libraries."""

from __future__ import annotations

import _ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_nft import processes

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "libcudnn.so.9"

# Transformer Engine 2.11, common/__init__.py: _load_cuda_library_from_system("cudnn"), by the same rules.
ENGINE = """
import ctypes, glob, os
paths = [os.environ.get(n) for n in ("CUDNN_HOME", "CUDNN_PATH", "CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
for path in filter(None, paths):
    libs = [lib for lib in glob.glob(f"{path}/**/libcudnn.so*", recursive=True) if "stub" not in lib]
    libs.sort(reverse=True, key=os.path.basename)
    if libs:
        LOADED = ctypes.CDLL(libs[0], mode=ctypes.RTLD_GLOBAL)._name
        break
"""
SCRIPT = """
import json, os
import {first}
import transformer_engine
from megatron_nft.processes import clean_environment
print(json.dumps([transformer_engine.LOADED, os.environ.get("CUDNN_HOME"), clean_environment().get("CUDNN_HOME")]))
"""


@pytest.fixture
def machine(tmp_path):
    """(site-packages with a torch and its cuDNN, system folder with another cuDNN). Any shared library will do."""
    site, system = tmp_path / "site", tmp_path / "system"
    for folder in site / "nvidia" / "cudnn" / "lib", system / "cuda" / "lib64":
        folder.mkdir(parents=True)
        shutil.copy(_ctypes.__file__, folder / LIBRARY)
    (site / "torch").mkdir()
    (site / "torch" / "__init__.py").touch()
    (site / "torch-2.11.0.dist-info").mkdir()
    (site / "torch-2.11.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0\nRequires-Dist: nvidia-cudnn-cu13==9.19.0.56\n"
    )
    (site / "transformer_engine").mkdir()
    (site / "transformer_engine" / "__init__.py").write_text(ENGINE)
    return site, system


def load(site: Path, first: str, **environment: str) -> list[str | None]:
    """[library that the engine loaded, CUDNN_HOME here, CUDNN_HOME of a server that would be started]."""
    kept = {n: v for n, v in processes.clean_environment().items() if not n.startswith(("CUDNN_", "CUDA_"))}
    given = {**kept, "PYTHONPATH": f"{site}:{ROOT}", **environment}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(first=first)], env=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("first", ["megatron_nft.policy", "megatron_nft.weights"])
def test_the_one_that_torch_brings_is_loaded(machine, first):
    site, system = machine
    own, other = site / "nvidia" / "cudnn", system / "cuda"
    for given in {"CUDA_HOME": str(other)}, {"CUDNN_PATH": str(other)}, {"CUDNN_HOME": str(other)}:
        without_us, *_ = load(site, "os", **given)
        assert without_us == str(other / "lib64" / LIBRARY)
        assert load(site, first, **given) == [str(own / "lib" / LIBRARY), str(own), given.get("CUDNN_HOME")]


def test_a_torch_that_uses_the_systems_is_left_alone(machine):
    """As in a container whose torch was built against the cuDNN of the container."""
    site, system = machine
    (site / "torch-2.11.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0\n")
    found = load(site, "megatron_nft.policy", CUDA_HOME=str(system / "cuda"))
    assert found == [str(system / "cuda" / "lib64" / LIBRARY), None, None]


def test_what_was_set_for_us_alone_is_given_back(monkeypatch):
    for name in "A", "B", "NFT_BEFORE_A", "NFT_BEFORE_B":
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("A", "theirs")
    for value in "ours", "again":
        processes.set_own_variable("A", value)
        processes.set_own_variable("B", value)
    assert os.environ["A"] == os.environ["B"] == "again"
    clean = processes.clean_environment()
    assert clean["A"] == "theirs" and "B" not in clean and not any(n.startswith("NFT_BEFORE") for n in clean)
    for name in "A", "B", "NFT_BEFORE_A", "NFT_BEFORE_B":
        del os.environ[name]
