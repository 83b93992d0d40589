"""`megatron-nft train`: check the settings, then start the ranks or join those that torchrun or Slurm started."""

from __future__ import annotations

import argparse
import os
import sys

from megatron_nft.config import Config, ConfigError, dump_config, load_config
from megatron_nft.train import launch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `train`."""
    parser.add_argument(
        "--config", action="append", required=True, metavar="FILE", help="YAML settings; later files win (repeatable)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example optimizer.lr=1e-5")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and the ranks, and stop")


def rank_plan(config: Config, world_size: int) -> str:
    """One line per rank: what it holds. Megatron's default order: TP fastest, then CP, DP and PP."""
    policy = config.policy
    tp, cp, pp = policy.tensor_model_parallel_size, policy.context_parallel_size, policy.pipeline_model_parallel_size
    dp = policy.data_parallel_size(world_size)
    lines = [f"{world_size} ranks = TP {tp} x {f'CP {cp} x ' if cp > 1 else ''}PP {pp} x DP {dp}"]
    lines += [
        f"  rank {r}: tensor {r % tp}, {f'context {r // tp % cp}, ' if cp > 1 else ''}data {r // (tp * cp) % dp}, "
        f"pipeline {r // (tp * cp * dp)}"
        for r in range(min(world_size, 64))
    ]
    if world_size > 64:
        lines.append(f"  … and {world_size - 64} more")
    return "\n".join(lines)


def _dry_run(config: Config, plan: str) -> int:
    """Print what would be done; return 2 where the model or the questions on this machine would be refused."""
    print(dump_config(config), end="")
    print(plan)
    try:
        if config.model.architecture or (config.model.path / "config.json").is_file():
            from megatron_nft.plan.architecture import read_architecture
            from megatron_nft.policy.positions import check_positions

            check_positions(read_architecture(config.model), config)
        from megatron_nft.train.preview import first_prompt

        print(first_prompt(config))
    except (ValueError, OSError) as e:
        print(f"megatron-nft train: {e}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> int:
    """Exit status of the command; see cli.py."""
    try:
        config = load_config(args.config, args.overrides)
        launch.adopt_slurm_environment()
        world_size = int(os.environ["WORLD_SIZE"]) if launch.joined() else config.num_processes
        plan = rank_plan(config, world_size)
    except (ConfigError, ValueError) as e:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # once on each host, whose files may differ
            print(f"megatron-nft train: settings cannot be used:\n{e}", file=sys.stderr)
        return 2
    if args.dry_run:
        return _dry_run(config, plan)
    if launch.joined():
        from megatron_nft.train.rank import run_rank

        return run_rank(config)
    from megatron_nft.train.preflight import check_inputs

    try:
        check_inputs(config)
    except (ValueError, OSError) as e:
        print(f"megatron-nft train: {e}", file=sys.stderr)
        return 2
    os.environ[launch.INPUTS_CHECKED] = "1"
    command = [sys.executable, "-m", "megatron_nft", "train"]
    command += [x for path in args.config for x in ("--config", path)] + list(args.overrides)
    return launch.start_local(command, world_size)
