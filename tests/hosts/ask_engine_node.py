"""A trainer rank that asks the servers of an engine node: python ask_engine_node.py FOLDER ROUTER.

While it generates, one of the two servers dies, and later it hangs; each time the rank goes on until that server, which
the node has started again, answers it under the wanted version. ROUTER: 1 to ask through a router. What it saw is in
FOLDER/seen.json.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np

from megatron_nft.config import RolloutConfig
from megatron_nft.engines import keys
from megatron_nft.engines.engine import Request, SamplingParams
from megatron_nft.engines.open import open_engine

VERSION = 4
BEFORE = 20  # answers before something happens


def main(folder: Path, router: bool) -> None:
    registry = folder / "registry"
    server = {"python": folder / "stand-in", "registry": registry, "router": router, "start_timeout_s": 100}
    rollout = RolloutConfig(engine="sglang", server={**server, "max_in_flight": 8, "stall_timeout_s": 2.0})
    engine = open_engine(folder, rollout, precision="fp32", log_dir=folder / "logs", load_weights=False)
    headers = keys.headers(keys.read_key(registry / keys.FILE))
    ask = {"headers": headers, "trust_env": False}
    brought: list[list[str]] = []

    def bring_weights(urls: list[str]) -> None:
        """Stands for the weight sync."""
        brought.append(urls)
        for url in urls:
            httpx.post(f"{url}/set_version", json={"version": VERSION}, timeout=60, **ask).raise_for_status()
        engine.weight_version = VERSION

    def on_wait(moved: bool) -> None:
        if urls := engine.left_behind():
            bring_weights(urls)

    def works_again(url: str) -> bool:
        try:
            told = httpx.get(url, timeout=1, **ask).json()
        except httpx.TransportError:
            return False
        return told["answers"] > 0 and told["weight_version"] == str(VERSION)

    def generate_while(happens: Callable[[str], None], url: str) -> int:
        """Answers until the server to which something happens works again."""
        requests = [Request(np.array([i % 1000], dtype=np.int32), 4, (0,)) for i in range(100_000)]
        for number, (request, _, completion) in enumerate(engine.generate(requests, SamplingParams(4), on_wait)):
            assert completion.token_ids.tolist() == [request % 1000]
            on_wait(True)
            if number == BEFORE:
                happens(url)
            if number > BEFORE and number % 50 == 0 and works_again(url):
                return number
        raise AssertionError("it did not come back")

    def dies(url: str) -> None:
        with contextlib.suppress(httpx.TransportError):
            httpx.post(f"{url}/die", json={}, timeout=5, **ask)

    def hangs(url: str) -> None:
        with contextlib.suppress(httpx.TransportError):
            httpx.post(f"{url}/hang", json={}, timeout=0.5, **ask)

    bring_weights(engine.all_urls)
    victim = engine.all_urls[0]
    seen = {"urls": engine.all_urls}
    for happens in (dies, hangs):
        seen[happens.__name__] = generate_while(happens, victim)
        engine.note_good_step()  # the node's bound is one restart between two steps
    engine.close()
    (folder / "seen.json").write_text(json.dumps(seen | {"brought": brought}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "1")
