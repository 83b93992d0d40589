"""Which software answers: the version that is installed in an environment, or that a running server gives."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from megatron_nft.engines import keys
from megatron_nft.processes import clean_environment

TIMEOUT_S = 30.0


def installed_version(packages: Sequence[str], python: Path) -> str:
    """Version of the first of `packages` in the environment of `python`, or `absent`. ValueError if it cannot run."""
    code = (
        "from importlib.metadata import distributions as d;"
        f"print(next((x.version for x in d() if x.name in {tuple(packages)!r}), 'absent'))"
    )
    command = [str(python), "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=clean_environment())
    except (OSError, subprocess.SubprocessError) as e:
        raise ValueError(f"{packages[0]}: its environment's interpreter {python} cannot be run ({e})") from None
    return done.stdout.strip()


def check_served_model(url: str, served: object, model: Path) -> None:
    """ValueError where a server says that it serves another model folder than `model`."""
    # A path that exists only where the server runs cannot be compared with ours.
    if isinstance(served, str) and Path(served).exists() and not Path(served).samefile(model):
        raise ValueError(f"the server at {url} serves {served}, not {model}; give the --model that it serves")


def first_answer(url: str, paths: Sequence[str], key: str | None = None) -> dict[str, Any]:
    """The JSON object of the first of the paths that answers with one; empty where none does."""
    for path in paths:
        try:
            response = httpx.get(url.rstrip("/") + path, headers=keys.headers(key), timeout=TIMEOUT_S, trust_env=False)
            answer = response.json() if response.is_success else None
        except (httpx.HTTPError, ValueError):
            continue
        if isinstance(answer, dict):
            return answer
    return {}


def named_version(engine: str, answer: dict[str, Any]) -> str:
    """`engine 1.2.3` from a server's answer about itself."""
    found = answer.get("version")
    return f"{engine} {found}" if isinstance(found, str) else f"{engine} of unknown version"
