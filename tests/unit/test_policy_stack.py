"""Versions that were tested together: nothing is said of those, one line of others; a wrong pair is refused."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from megatron_nft.policy.stack import TESTED, Stack, check_stack, read_stack, untested

ROOT = Path(__file__).resolve().parents[2]
OLD = Stack("3.11.7", "0.16.1", "2.13.0+cpu", None)
NEW = Stack("3.12.1", "0.19.2", "2.13.0+cu130", "2.17.1")
ON_GPU = Stack("3.12.3", "0.16.1", "2.11.0+cu130", "2.11.0")


@pytest.mark.parametrize("stack", [OLD, NEW, ON_GPU, replace(OLD, transformer_engine="2.11.0")])
def test_nothing_is_said_of_what_was_tested(stack):
    check_stack(stack)
    assert untested(stack) is None


@pytest.mark.parametrize(
    "stack",
    [
        replace(OLD, python="3.12.1"),
        replace(OLD, torch="2.12.1"),
        replace(NEW, megatron_core="0.19.0"),
        replace(NEW, transformer_engine="2.20.2"),
        replace(ON_GPU, transformer_engine="2.9.0"),
    ],
)
def test_other_versions_were_not_tested(stack):
    check_stack(stack)
    said = untested(stack)
    assert said is not None
    assert f"megatron-core {stack.megatron_core}" in said and said.endswith("were not tested together")


@pytest.mark.parametrize(("core", "engine"), [("0.16.1", "2.13.0"), ("0.18.2", "2.17.1"), ("0.16.1", "2.20.2")])
def test_a_pair_whose_gradient_norm_lacks_experts_is_refused(core, engine):
    with pytest.raises(ValueError, match=rf"megatron-core {core} with Transformer Engine {engine} .*below 2\.13"):
        check_stack(Stack("3.12.1", core, "2.13.0", engine))


def test_this_environment_was_tested():
    stack = read_stack()
    assert Version(stack.torch).release >= (2, 11)
    assert untested(stack) is None


def _requirements(python: str) -> dict[str, Requirement]:
    """What setup.py asks for on a Python version, by name; the extra `te` included."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    found = {}
    for text in texts:
        if text.startswith(("megatron-core", "torch>", "transformer-engine")):
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
                found[requirement.name] = requirement
    return found


@pytest.mark.parametrize("tested", TESTED, ids=lambda t: f"{t.python}-{t.megatron_core}")
def test_setup_allows_what_was_tested(tested):
    wanted = _requirements(tested.python)
    exact = tested.megatron_core.removeprefix("==")
    assert exact in wanted["megatron-core"].specifier
    assert tested.torch.strip("=.*") + ".0" in wanted["torch"].specifier
    lowest = tested.transformer_engine.split(",")[0].strip(">=.*")
    assert lowest + ".0" in wanted["transformer-engine"].specifier
