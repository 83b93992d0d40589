"""A rank whose host's server is killed while it generates: python lose_engines.py FOLDER.

Rank 1, on the second host, kills its own server after a few answers, and goes on until that one answers it again. Rank
0 has its few answers soon, and waits. What rank R saw is in FOLDER/rank-R.json.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import torch
import torch.distributed as dist
from processes import server_of
from stand_in import interpreter

from megatron_nft.config import RolloutConfig
from megatron_nft.console import Console
from megatron_nft.engines import keys
from megatron_nft.engines.engine import Request, SamplingParams
from megatron_nft.engines.open import open_engine
from megatron_nft.train.lifecycle import Lifecycle, Phases, StopSignals
from megatron_nft.train.rounds import Rounds

VERSION = 4
BEFORE = 20  # answers before the server is killed


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    layout = SimpleNamespace(rank=rank, world_size=2, device=torch.device("cpu"), world_gloo=dist.group.WORLD)
    if rank == 0:
        interpreter(folder)
    dist.barrier()
    server = {"python": folder / "stand-in", "start_timeout_s": 100, "max_in_flight": 4}
    rollout = RolloutConfig(engine="sglang", server=server)
    options = {"precision": "fp32", "log_dir": folder / "logs", "layout": layout, "load_weights": False}
    engine = open_engine(folder, rollout, **options)
    brought: list[list[str]] = []

    def bring_weights(urls: Sequence[str]) -> None:
        """Stands for the weight sync: all ranks meet, and the servers have the version afterwards."""
        brought.append(list(urls))
        if rank == 0:
            headers = keys.headers(keys.read_key(folder / "logs" / keys.FILE))
            for url in urls:
                answer = httpx.post(
                    f"{url}/set_version", headers=headers, json={"version": VERSION}, trust_env=False, timeout=60
                )
                answer.raise_for_status()
        dist.barrier()
        engine.weight_version = VERSION

    bring_weights(engine.all_urls)
    life = Lifecycle(Phases(rank, folder, 300.0), StopSignals(), Console(rank))
    rounds = Rounds(life, dist.group.WORLD, engine.left_behind, bring_weights)
    prompts = (np.array([i % 1000], dtype=np.int32) for i in itertools.count())
    requests = [Request(next(prompts), 4, (0,)) for _ in range(5 if rank == 0 else 100_000)]
    by: list[int] = []  # the host that gave each answer
    for number, (_, _, completion) in enumerate(engine.generate(requests, SamplingParams(4), rounds.on_wait)):
        rounds.on_wait(True)
        by.append(-int(completion.logprobs[0]))
        if rank == 1 and number == BEFORE:
            os.kill(server_of(engine.group.servers[0]._supervisor.pid), signal.SIGKILL)
        if rank == 1 and number > BEFORE and by[-1] == 2 and 1 in by:
            break
    rounds.wait_for_all()
    hosts = [host for host, _ in itertools.groupby(by)]
    starts = engine.group.servers[0].starts
    seen = {"by": hosts, "answers": len(by), "brought": brought[1:], "own": engine.urls, "starts": starts}
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    engine.close()
    life.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
