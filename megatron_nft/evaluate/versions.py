"""The software that makes an evaluation, for its protocol."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_nft import __version__

PACKAGES = ("torch", "transformers", "tokenizers", "math-verify")


def package_versions() -> dict[str, str]:
    """Packages that change what is asked, answered or graded."""
    found = {"megatron_nft": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def installed_engine_version(engine: str, python: Path | None) -> str:
    """Version of sglang or vllm in the environment of `python` (None: our own); the embedded engine is transformers."""
    if engine == "embedded":
        return f"transformers {version('transformers')}"
    code = (
        "from importlib.metadata import distributions as d;"
        f"print(next((x.version for x in d() if x.name in ({engine!r}, {engine + '-cpu'!r})), 'absent'))"
    )
    command = [str(python or sys.executable), "-c", code]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as e:
        raise ValueError(f"{engine}: its environment's interpreter {command[0]} cannot be run ({e})") from None
    return f"{engine} {found}"


def served_engine_version(engine: str, url: str, model: Path) -> str:
    """Version that a running server gives for itself. ValueError where it says that it serves another model."""
    info = _first_answer(url, {"sglang": ("/get_model_info", "/model_info"), "vllm": ("/v1/models",)}[engine])
    if engine == "vllm":
        info = (info.get("data") or [{}])[0]
    served = info.get("model_path") or info.get("root")
    # A path that exists only where the server runs cannot be compared with ours.
    if isinstance(served, str) and Path(served).exists() and not Path(served).samefile(model):
        raise ValueError(f"the server at {url} serves {served}, not {model}; give the --model that it serves")
    found = _first_answer(url, {"sglang": ("/get_server_info", "/server_info"), "vllm": ("/version",)}[engine])
    return f"{engine} {found['version']}" if isinstance(found.get("version"), str) else f"{engine} of unknown version"


def _first_answer(url: str, paths: tuple[str, ...]) -> dict[str, Any]:
    """The first of the paths that answers with a JSON object; empty where none does."""
    import httpx

    for path in paths:
        try:
            response = httpx.get(url.rstrip("/") + path, timeout=30, trust_env=False)
            answer = response.json() if response.is_success else None
        except (httpx.HTTPError, ValueError):
            continue
        if isinstance(answer, dict):
            return answer
    return {}
