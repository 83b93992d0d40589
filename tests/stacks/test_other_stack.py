"""What one supported pair of Python and megatron-core writes, the other reads: a run's checkpoints, converted ones."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from other_python import NEWER
from safetensors.torch import load_file

from runs import Run, make_start, merge, metrics_of

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = {"older": ROOT / ".venv" / "bin" / "python", "newer": ROOT / f".venv-{NEWER}" / "bin" / "python"}
Python = Callable[[str], str]
TOLERANCE = 2e-5
"""Between weights of the two stacks after four steps of Adam with lr 1e-3; the same torch, but other code around it."""


@pytest.fixture(scope="module")
def python() -> Python:
    """The interpreter of a stack; skips where only one is installed."""
    for name, path in ENVIRONMENTS.items():
        if not path.is_file():
            pytest.skip(f"the {name} stack is not installed: {path.relative_to(ROOT)} (tests/run.sh makes it)")
    found = {name: _versions(path) for name, path in ENVIRONMENTS.items()}
    if found["older"] == found["newer"]:
        pytest.skip(f"both environments have {found['older']}")
    return lambda name: str(ENVIRONMENTS[name])


def _versions(python: Path) -> str:
    code = "import platform, importlib.metadata as m; print(platform.python_version(), m.version('megatron-core'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout.strip()


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    start = make_start(tmp_path_factory.mktemp("stacks"))
    return merge(start, train__num_steps=4, eval__every_steps=0)


@pytest.fixture(scope="module")
def reference(settings, python) -> Path:
    """A run of four steps that the older stack makes alone."""
    run = Run(merge(settings, run_dir=f"{settings['run_dir']}_older"), python=python("older"))
    assert run.wait() == 0, run.text
    return run.run_dir


@pytest.mark.parametrize(("first", "second"), [("older", "newer"), ("newer", "older")])
def test_a_run_goes_on_under_the_other_versions(first, second, settings, reference, python):
    run_dir = f"{settings['run_dir']}_{first}_then_{second}"
    begun = Run(merge(settings, run_dir=run_dir, train__num_steps=2), python=python(first))
    assert begun.wait() == 0, begun.text
    finished = Run(merge(settings, run_dir=run_dir), python=python(second))
    assert finished.wait() == 0, finished.text
    assert "going on from" in finished.text
    wanted, found = (load_file(folder / "hf" / "model.safetensors") for folder in (reference, finished.run_dir))
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert (tensor - found[name]).abs().max() <= TOLERANCE, name
    trained = [
        [row.get("accuracy/train") for row in metrics_of(folder)[1:]] for folder in (reference, finished.run_dir)
    ]
    assert trained[0] == trained[1]  # the very same answers


@pytest.mark.parametrize(("first", "second"), [("older", "newer"), ("newer", "older")])
def test_converted_checkpoints_are_read_back_bit_for_bit(first, second, settings, tmp_path, python):
    model = Path(settings["model"]["path"])
    _convert(python(first), "hf-to-megatron", str(model), str(tmp_path / "megatron"), "--tp", "2", "--pp", "2")
    _convert(python(second), "megatron-to-hf", str(tmp_path / "megatron"), str(tmp_path / "hf"))
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].numpy().tobytes() == after[name].numpy().tobytes(), name


def _convert(python: str, *arguments: str) -> None:
    command = [python, "-m", "megatron_nft", "convert", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
