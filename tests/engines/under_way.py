"""How many requests a real server has at this moment, by what it says of itself."""

from __future__ import annotations

import re
from collections.abc import Sequence

import httpx

RUNNING_AND_WAITING = re.compile(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} (\S+)$", re.M)


def requests_under_way(kind: str, urls: Sequence[str]) -> int:
    """Over all servers; `kind` is sglang or vllm. Every sample of a request counts with SGLang."""
    return sum({"sglang": _sglang, "vllm": _vllm}[kind](url) for url in urls)


def _sglang(url: str) -> int:
    loads = httpx.get(f"{url}/v1/loads?include=core", timeout=60, trust_env=False).json()["loads"]
    return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)


def _vllm(url: str) -> int:
    text = httpx.get(f"{url}/metrics/", timeout=60, trust_env=False).text
    return int(sum(map(float, RUNNING_AND_WAITING.findall(text))))
