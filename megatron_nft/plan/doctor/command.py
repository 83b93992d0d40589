"""`megatron-nft doctor`: would a run with these settings start here?

Exit status: 0 nothing that would stop it was found, 1 it would fail, 2 settings or arguments that cannot be used.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_nft.arguments import describe, positive_int
from megatron_nft.config import Config, ConfigError, load_config

if TYPE_CHECKING:
    from megatron_nft.policy.family import ModelSpec

PATIENCE_S = 180.0  # for the facts of other nodes, whose Python may come from a slow disk


def _not_negative(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 0")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `doctor`."""
    add = parser.add_argument
    add("--config", action="append", required=True, metavar="FILE", help="YAML settings; later files win (repeatable)")
    add("--deep", action="store_true", help="also run a layer of Transformer Engine and start a server (minutes)")
    add(
        "--ranks-per-node",
        type=_not_negative,
        metavar="N",
        help="trainer ranks on each node (num_processes); 0: nodes of engines alone",
    )
    add("--nodes", type=positive_int, metavar="N", help="nodes on which this command runs (Slurm's, or 1)")
    add("--node", type=_not_negative, metavar="I", help="number of this node, from 0 (Slurm's, or 0)")
    add("--meeting", metavar="NAME", help="a new name on which the nodes agree (Slurm's job and step)")
    add("overrides", nargs="*", metavar="key=value", help="settings, as for train")
    describe(
        parser,
        """
Under Slurm, one task on each node:   srun --ntasks-per-node=1 megatron-nft doctor --config F
Without Slurm, on every node at once: megatron-nft doctor --config F --nodes 2 --node I --meeting NAME
The first node prints one table for all. docs/cluster.md says what is checked.
""",
    )


def _place(args: argparse.Namespace) -> tuple[int, int, str]:
    """(number of this node, number of nodes, name of the meeting). ValueError where the nodes could not meet."""
    env = os.environ
    in_step = env.get("SLURM_STEP_ID", "").isdigit() and args.nodes is None
    num_nodes = int(env["SLURM_STEP_NUM_NODES"]) if in_step else args.nodes or 1
    if in_step and int(env["SLURM_STEP_NUM_TASKS"]) != num_nodes:
        raise ValueError("start one task on each node: srun --ntasks-per-node=1")
    node = int(env["SLURM_NODEID"]) if in_step else args.node or 0
    name = (
        f"{env['SLURM_JOB_ID']}_{env.get('SLURM_RESTART_COUNT', 0)}_{env['SLURM_STEP_ID']}" if in_step else args.meeting
    )
    if node >= num_nodes:
        raise ValueError(f"--node {node}: must be below --nodes {num_nodes}")
    if name is None:
        if num_nodes > 1:
            raise ValueError("--nodes needs --meeting NAME outside of Slurm, the same new name on every node")
        name = f"{os.uname().nodename}_{os.getpid()}"
    return node, num_nodes, name


def run(args: argparse.Namespace) -> int:
    """Exit status of the command; see the module."""
    try:
        config = load_config(args.config, args.overrides)
        node, num_nodes, name = _place(args)
    except (ConfigError, ValueError) as e:
        print(f"megatron-nft doctor: {e}", file=sys.stderr)
        return 2
    ranks = config.num_processes if args.ranks_per_node is None else args.ranks_per_node
    return _examine(config, ranks, node, num_nodes, config.run_dir / "doctor" / name, args.deep)


def _examine(config: Config, ranks: int, node: int, num_nodes: int, folder: Path, deep: bool) -> int:
    from megatron_nft.plan.doctor import meeting
    from megatron_nft.plan.doctor.checks import find_problems
    from megatron_nft.plan.doctor.facts import gather
    from megatron_nft.plan.doctor.table import as_text

    port = os.environ.get("NFT_MASTER_PORT") or os.environ.get("MASTER_PORT")
    facts = gather(config, ranks, int(port) if port and node == 0 and ranks else None)
    if deep:
        facts = replace(facts, deep=_deep(config, facts.ranks, bool(facts.gpus)))
    try:
        met = meeting.meet(folder, node, num_nodes, facts, PATIENCE_S)
    except OSError as e:
        print(f"megatron-nft doctor: {facts.host}: run_dir {config.run_dir} cannot be used: {e}", file=sys.stderr)
        return 1
    if met is None:
        return 0
    problems = find_problems(config, met, num_nodes, _architecture(config))
    print(as_text([answer.facts for _, answer in sorted(met.answers.items())], problems), flush=True)
    if len(met.answers) == num_nodes:
        meeting.clean_up(folder)
    return 1 if any(problem.fatal for problem in problems) else 0


def _architecture(config: Config) -> ModelSpec | None:
    """The model's; None where it cannot be read, which the checks of files, or the run itself, say better."""
    from megatron_nft.plan.architecture import read_architecture

    try:
        return read_architecture(config.model)
    except ConfigError:
        return None


def _deep(config: Config, ranks: int, gpus: bool) -> dict[str, str]:
    """Name of each check that these settings need -> why it failed, or empty."""
    from megatron_nft.plan.doctor.deep import engine_answers, transformer_engine_layer
    from megatron_nft.plan.doctor.facts import starts_servers

    found = {}
    if gpus and ranks and config.policy.layer_spec != "local":
        found["Transformer Engine"] = transformer_engine_layer()
    if starts_servers(config, ranks):
        folder = Path(tempfile.mkdtemp(prefix="nft-doctor-"))
        try:
            name = f"{config.rollout.engine} server"
            found[name] = engine_answers(config, folder, "cuda" if gpus else "cpu")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return found
