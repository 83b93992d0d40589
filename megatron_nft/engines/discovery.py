"""Engines on nodes of their own announce themselves in a folder that the trainer watches: no fixed ports or names.

    FOLDER/<node>.json   {"urls": ["http://10.0.0.7:41231", ...]}, written once every server of the node is healthy

A server that dies is started again by its node on the same port, so a file stays true until its node ends.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_nft.engines.engine import EngineError
from megatron_nft.files import write_atomically

POLL_S = 0.5


def register(folder: Path, node: str, urls: Sequence[str]) -> Path:
    """Announce the servers of `node`. A reader never sees half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{node}.json"
    write_atomically(path, json.dumps({"urls": list(urls)}))
    return path


def registered(folder: Path) -> dict[str, list[str]]:
    """Node -> URLs of the nodes that have announced themselves. EngineError for a file of another form."""
    found = {}
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            urls = json.loads(path.read_text(encoding="utf-8"))["urls"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise EngineError(f"{path} is no announcement of engines ({type(e).__name__}: {e})") from None
        if not urls or not all(isinstance(u, str) and u.startswith(("http://", "https://")) for u in urls):
            raise EngineError(f"{path}: urls is {urls!r}, not a list of http addresses")
        found[path.stem] = urls
    return found


def wait_for_engines(folder: Path, num_nodes: int, timeout_s: float) -> list[str]:
    """Wait for `num_nodes` nodes and return all URLs, in the order of node names.

    EngineError after `timeout_s` seconds; it names the nodes that have announced themselves.
    """
    deadline = time.monotonic() + timeout_s
    while len(found := registered(folder)) < num_nodes:
        if time.monotonic() > deadline:
            raise EngineError(
                f"{len(found)} of {num_nodes} engine nodes announced themselves in {folder} within {timeout_s:.0f} s "
                f"(rollout.server.start_timeout_s): {', '.join(found) or 'none'}"
            )
        time.sleep(POLL_S)
    return [url for urls in found.values() for url in urls]
