"""What an installation holds: a wheel is built from a copy of the sources, without a network."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import megatron_nft

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "megatron_nft", source / "megatron_nft", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)], cwd=source, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(folder / done.stdout.split()[-1]) as archive:
        yield archive


def read(archive, name):
    (path,) = [p for p in archive.namelist() if p.endswith(f".dist-info/{name}")]
    return archive.read(path).decode("utf-8")


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "megatron_nft").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"megatron_nft/py.typed", "megatron_nft/report/static/page.html"} <= files
    assert files == {name for name in wheel.namelist() if name.startswith("megatron_nft/")}


def test_metadata(wheel):
    metadata = Parser().parsestr(read(wheel, "METADATA"))
    assert (metadata["Name"], metadata["Version"]) == ("megatron_nft", megatron_nft.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == "<3.13,>=3.11"
    assert "# megatron_nft" in metadata.get_payload()
    required = {re.match(r"[\w.-]+", line).group() for line in metadata.get_all("Requires-Dist") if "extra" not in line}
    assert {"torch", "megatron-core", "transformers", "pydantic", "math-verify"} <= required
    assert set(metadata.get_all("Provides-Extra")) == {"sglang", "vllm", "te", "gguf", "nemo-run", "wandb", "dev"}


def test_the_command(wheel):
    scripts = configparser.ConfigParser()
    scripts.read_string(read(wheel, "entry_points.txt"))
    assert dict(scripts["console_scripts"]) == {"megatron-nft": "megatron_nft.cli:main"}
