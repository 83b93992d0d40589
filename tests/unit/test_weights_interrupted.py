"""Conversions that fail or are ended on the way: nothing that looks complete is left."""

from __future__ import annotations

import resource
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from model_folders import models

from megatron_nft.console import Progress
from megatron_nft.weights.offline.convert import hf_to_megatron, megatron_to_hf
from megatron_nft.weights.offline.diff import open_weights
from megatron_nft.weights.offline.megatron_writer import TargetLayout

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models(tmp_path_factory)


class StopsAfter(Progress):
    """Progress that raises at the n-th tensor."""

    def __init__(self, count: int) -> None:
        self.left = count

    def advance(self, amount: int = 1, name: str = "") -> None:
        self.left -= 1
        if not self.left:
            raise OSError("No space left on device")


@pytest.mark.parametrize("count", [1, 12])
def test_a_failed_conversion_leaves_no_folder_that_looks_complete(model, tmp_path, count):
    with pytest.raises(Exception, match="No space left"):
        hf_to_megatron(model(), tmp_path / "megatron", TargetLayout(2, 2, 1), progress=StopsAfter(count))
    assert not (tmp_path / "megatron").exists()
    hf_to_megatron(model(), tmp_path / "megatron", TargetLayout(2, 2, 1))  # the left-over does not stand in the way
    with pytest.raises(OSError, match="No space left"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", progress=StopsAfter(count))
    assert not (tmp_path / "hf").exists()
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")


@pytest.mark.parametrize("name", ["convert_hf_to_megatron.py", "convert_megatron_to_hf.py", "reshard_checkpoint.py"])
def test_a_full_disk_is_one_line_and_leaves_no_folder(model, tmp_path, name, monkeypatch, capsys):
    """A limit on the size of files fails writes as a full disk does."""
    source = model()
    if name != "convert_hf_to_megatron.py":
        hf_to_megatron(source, tmp_path / "megatron", TargetLayout(1, 1, 1))
        source = tmp_path / "megatron"
    monkeypatch.setattr(sys, "argv", [str(TOOLS / name), str(source), str(tmp_path / "out")])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(SystemExit) as ended:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    captured = capsys.readouterr()
    assert ended.value.code == 1 and not captured.out and not (tmp_path / "out").exists()
    file = "model.safetensors" if name == "convert_megatron_to_hf.py" else "__0_0.distcp"
    assert captured.err == f"{name}: [Errno 27] File too large: '{tmp_path / 'out.partial' / file}'\n"


def test_an_existing_folder_is_not_touched(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(FileExistsError, match="exists already"):
        hf_to_megatron(model(), tmp_path / "out", TargetLayout(1, 1, 1))
    assert (tmp_path / "out" / "precious").read_text() == "x"


HALTS = """
import runpy, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background jobs ignore it
from megatron_nft import console
count = 0

def advance(self, amount=1, name=""):
    global count
    count += 1
    if count == 10:
        print("halfway", flush=True)
        time.sleep(600)

console._Lines.advance = advance
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("convert_hf_to_megatron.py", signal.SIGKILL),
        ("convert_hf_to_megatron.py", signal.SIGINT),
        ("convert_megatron_to_hf.py", signal.SIGTERM),
    ],
)
def test_an_ended_tool_leaves_no_folder_that_looks_complete(model, tmp_path, name, number):
    """Ended after ten tensors, by a signal."""
    source = model()
    if name == "convert_megatron_to_hf.py":
        hf_to_megatron(source, tmp_path / "megatron", TargetLayout(1, 1, 1))
        source = tmp_path / "megatron"
    command = [sys.executable, "-c", HALTS, str(TOOLS / name), str(source), str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "halfway\n", process.stderr.read()
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    if number == signal.SIGINT:
        assert process.returncode == 130
        # torch may have warned before
        assert errors.splitlines()[-1] == f"interrupted; {tmp_path / 'out'} was not made"
    else:
        assert process.returncode == -number
    assert not (tmp_path / "out").exists() and any((tmp_path / "out.partial").iterdir())
    with pytest.raises(ValueError, match=r"is no Megatron checkpoint|is damaged or cut off"):
        open_weights(tmp_path / "out.partial")
