"""The calls that put servers to sleep, against the source of the installed engines: neither can sleep on a CPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_nft.engines.sglang.memory import MEMORY_CALLS as SGLANG
from megatron_nft.engines.vllm.memory import MEMORY_CALLS as VLLM

ROOT = Path(__file__).resolve().parents[2]
ROUTE = re.compile(r"""@(?:router|app)\.(?:post|api_route)\(\s*["']([^"']+)""")


@pytest.mark.parametrize(("engine", "by_level"), [("sglang", SGLANG), ("vllm", VLLM)])
def test_the_installed_engine_has_the_calls(engine, by_level):
    if not (ROOT / f".venv-{engine}" / ".installed").is_file():
        pytest.skip(f"{engine} is not installed (bash tools/install_engine.sh {engine})")
    (folder,) = ROOT.glob(f".venv-{engine}/lib/python*/site-packages/{engine}")
    files = [f for name in ("entrypoints", "srt/entrypoints") for f in (folder / name).rglob("*.py")]
    found = {path for f in files for path in ROUTE.findall(f.read_text())}
    calls = [path for both in by_level.values() for path, _ in (*both.release, *both.resume)]
    calls += [both.refused_while_busy for both in by_level.values() if both.refused_while_busy is not None]
    assert {path.partition("?")[0] for path in calls} <= found
