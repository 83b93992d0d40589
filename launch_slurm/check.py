"""Checks of a job before it trains: settings, layout, model, files. Prints the run folder and NFT_ADDRESS.

    check.py --ranks N [--engine-nodes M] --config FILE … [key=value …]

One line on stderr and status 2 for what cannot be used. Imports no torch, since it runs on a login node too; the ranks
look at questions, graders and weights before they build a model (train/rank.py).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_nft.config import Config, ConfigError, load_config
from megatron_nft.train.preflight import check_without_torch


def check(config: Config, world_size: int, engines: bool) -> None:
    """ValueError for the first thing that would stop the run."""
    config.policy.data_parallel_size(world_size)
    check_without_torch(config)
    if engines and not config.rollout.uses_servers:
        raise ValueError("NFT_ENGINE_NODES needs rollout.engine=sglang or vllm, not embedded")
    if engines and config.rollout.server.urls:
        raise ValueError("NFT_ENGINE_NODES and rollout.server.urls exclude each other")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--engine-nodes", type=int, default=0)
    parser.add_argument("--config", action="append", required=True)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    # Where the ranks look for an algorithm of the user's own; a script has its own folder on the path instead.
    sys.path.insert(0, str(Path.cwd()))
    try:
        config = load_config(args.config, args.overrides)
        check(config, args.ranks, args.engine_nodes > 0)
        print(config.run_dir.absolute(), os.environ.get("NFT_ADDRESS", ""), sep="\n")
    except (ConfigError, ValueError, OSError) as e:
        print("nft: " + "; ".join(str(e).splitlines()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
