"""Runs the checks of a rank script against servers that a fixture started, one result per check."""

from __future__ import annotations

from pathlib import Path

import launch
import pytest

HERE = Path(__file__).resolve().parent


def names_of(script: str) -> list[str]:
    """The checks of a rank script, in order."""
    return launch.names_of(HERE / script)


def run(script: str, world_size: int, *arguments: object, timeout_s: float = 500) -> dict[str, str]:
    """check -> error, "" where it passed."""
    return launch.launch(HERE / script, world_size, tuple(map(str, arguments)), timeout_s)


def report(errors: dict[str, str], check: str) -> None:
    error = errors.get(check, errors.get("", "no rank reported this check"))
    if error:
        pytest.fail(error, pytrace=False)
