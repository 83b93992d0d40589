"""Which versions were tested together, and which pairs are refused.

The one table of it: setup.py's ranges follow from it, a start with other versions warns once with it, and
tests/unit/test_policy_stack.py compares the two.
"""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet
from packaging.version import Version


@dataclass(frozen=True)
class Stack:
    """Versions of one environment; Transformer Engine is None where it is not installed."""

    python: str
    megatron_core: str
    torch: str
    transformer_engine: str | None


@dataclass(frozen=True)
class Tested:
    """Versions that were tested together. `transformer_engine` may be left out of an environment."""

    python: str
    megatron_core: str
    torch: str
    transformer_engine: str
    how: str

    def covers(self, stack: Stack) -> bool:
        """Whether `stack` is one of these."""
        engine = stack.transformer_engine
        return (
            stack.python.rpartition(".")[0] == self.python
            and Version(stack.megatron_core) in SpecifierSet(self.megatron_core)
            and Version(Version(stack.torch).base_version) in SpecifierSet(self.torch)
            and (engine is None or Version(engine) in SpecifierSet(self.transformer_engine))
        )


TESTED = (
    Tested("3.11", "==0.16.1", "==2.13.*", ">=2.9,<2.12", "CPU tests only; no GPU has run it"),
    Tested("3.12", "==0.16.1", "==2.11.*", "==2.11.*", "tests/gpu on an H100, 2026-11-27"),
    Tested("3.12", "==0.19.2", "==2.13.*", ">=2.17,<2.18", "CPU tests only; no GPU has run it"),
)
"""CPU tests have no Transformer Engine: its range in their rows is what megatron-core asks for (0.16.1), and 2.17 what
megatron-core's branch of 0.19 is released with (Megatron-LM #6291)."""

MIN_TRANSFORMER_ENGINE = "2.9"  # that megatron-core 0.16.1 works with

NORM_FAULT = (Version("0.19"), Version("2.13"))
"""With megatron-core below the first and Transformer Engine from the second on, the gradient norm leaves out experts
(Megatron-LM #5916)."""


def read_stack() -> Stack:
    """Read the versions of this environment."""
    try:
        engine = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        engine = None
    return Stack(
        platform.python_version(),
        importlib.metadata.version("megatron-core"),
        importlib.metadata.version("torch"),
        engine,
    )


def check_stack(stack: Stack) -> None:
    """ValueError for a pair that computes wrong numbers."""
    core, engine = Version(stack.megatron_core), stack.transformer_engine
    if engine is not None and core < NORM_FAULT[0] and Version(engine) >= NORM_FAULT[1]:
        raise ValueError(
            f"megatron-core {core} with Transformer Engine {engine} leaves experts out of the gradient norm "
            f"(Megatron-LM #5916): install Transformer Engine below {NORM_FAULT[1]}, or megatron-core {NORM_FAULT[0]} "
            "or newer, which needs Python 3.12"
        )


def untested(stack: Stack) -> str | None:
    """Return that these versions were not tested together, in one line; None where they were."""
    if any(tested.covers(stack) for tested in TESTED):
        return None
    return (
        f"Python {stack.python}, megatron-core {stack.megatron_core}, torch {stack.torch}, Transformer Engine "
        f"{stack.transformer_engine or 'not installed'} were not tested together"
    )


def table() -> str:
    """Return `TESTED` as lines of text."""
    head = ("Python", "megatron-core", "torch", "Transformer Engine", "tested by")
    rows = [(t.python, t.megatron_core, t.torch, t.transformer_engine, t.how) for t in TESTED]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *rows]
    )
