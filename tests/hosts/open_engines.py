"""A rank that opens its engine under several settings and notes what it sees: python open_engines.py FOLDER.

Every host draws the same ports. What rank R saw is in FOLDER/rank-R.json: case -> facts, or the text of the error.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import numpy as np
import torch
import torch.distributed as dist
from stand_in import interpreter

from megatron_nft.config import RolloutConfig
from megatron_nft.engines import server
from megatron_nft.engines.engine import EngineError, Request, SamplingParams
from megatron_nft.engines.open import open_engine

CASES = {"auto": {}, "all interfaces": {"host": "0.0.0.0"}, "loopback": {"host": "127.0.0.1"}}


def facts(folder: Path, settings: dict, layout: SimpleNamespace) -> dict:
    """Who answers at each URL as this rank sees it, and whether the rank gets answers."""
    given = {"python": folder / "stand-in", "num_servers": 2, "start_timeout_s": 100, **settings}
    rollout = RolloutConfig(engine="sglang", server=given)
    engine = open_engine(folder, rollout, precision="fp32", log_dir=folder / "logs", layout=layout)
    key = engine.key
    asked = {"trust_env": False, "timeout": 60, "headers": {"Authorization": f"Bearer {key}"}}
    who = {url: httpx.get(url, **asked).json()["host"] for url in engine.all_urls}
    strangers = {httpx.post(url, trust_env=False, timeout=60).status_code for url in engine.all_urls if key}
    requests = [Request(np.array([i], dtype=np.int32), 1, (0,)) for i in range(6)]
    answers = sorted((i, c.token_ids.tolist()) for i, _, c in engine.generate(requests, SamplingParams(4)))
    port = urlsplit(engine.urls[0]).port
    with socket.socket() as probe:
        over_loopback = probe.connect_ex(("127.0.0.1", port)) == 0
    dist.barrier()
    engine.close()
    return {
        "asks": engine.urls,
        "who": who,
        "answers": answers,
        "over_loopback": over_loopback,
        "key": key,
        "strangers": list(strangers),
    }


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    layout = SimpleNamespace(
        rank=rank, world_size=dist.get_world_size(), device=torch.device("cpu"), world_gloo=dist.group.WORLD
    )
    if rank == 0:
        interpreter(folder)
    dist.barrier()
    ports = itertools.count(15100)
    server.free_port = lambda host: next(ports)
    seen: dict[str, object] = {"host": os.uname().nodename}
    for case, settings in CASES.items():
        try:
            seen[case] = facts(folder, settings, layout)
        except EngineError as e:
            seen[case] = str(e)
        dist.barrier()
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
