"""A rank that starts everything a run starts, and notes its own environment: python start_children.py FOLDER."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from stand_in import interpreter

from megatron_nft.config import RolloutConfig, VerifyConfig
from megatron_nft.engines.open import open_engine
from megatron_nft.verify import VerifierPool


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    layout = SimpleNamespace(
        rank=rank, world_size=dist.get_world_size(), device=torch.device("cpu"), world_gloo=dist.group.WORLD
    )
    record = [f"--record={folder}"]
    server = {"router": True, "extra_args": record, "router_args": record, "start_timeout_s": 100}
    if rank == 0:
        interpreter(folder)
    rollout = RolloutConfig(engine="sglang", server={**server, "python": folder / "stand-in"})
    dist.barrier()
    engine = open_engine(folder, rollout, precision="fp32", log_dir=folder / "logs", layout=layout)
    if rank == 0:
        (folder / "rank.json").write_text(json.dumps(dict(os.environ)))
        pool = VerifierPool(VerifyConfig(grader="environment_grader.grade", timeout_s=100))
        pool.submit("", str(folder / "grader.json")).result(100)
        pool.close()
    dist.barrier()
    engine.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
