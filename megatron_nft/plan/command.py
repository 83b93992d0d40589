"""`megatron-nft plan`: does the run fit the machines, and how long will a step take?

Exit status: 0 fits, 1 does not fit, 2 the settings or arguments cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace

from megatron_nft.arguments import positive_float, positive_int
from megatron_nft.config import ConfigError, load_config
from megatron_nft.plan.architecture import read_architecture
from megatron_nft.plan.hardware import CHIPS, GIB
from megatron_nft.plan.layout import Cluster, LayoutSettings, with_seq_len
from megatron_nft.plan.mode_times import mode_time
from megatron_nft.plan.plan import make_plan, nearest, search
from megatron_nft.plan.render import as_dict, as_text, mode_table, search_table
from megatron_nft.plan.rollout_modes import MODES
from megatron_nft.plan.timing import Workload
from megatron_nft.policy.positions import check_positions


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{value}: must be above 0 and at most 1")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `plan`."""
    add = parser.add_argument
    add("--config", action="append", required=True, metavar="FILE", help="YAML settings; later files win (repeatable)")
    add("--nodes", type=positive_int, default=1, metavar="N", help="nodes of the job (1)")
    add("--gpus-per-node", type=positive_int, required=True, metavar="G", help="GPUs, or processes with --gpu cpu")
    add(
        "--gpu",
        choices=sorted(CHIPS),
        required=True,
        help="chip whose rates and memory are assumed",
    )
    add("--engine-nodes", type=int, default=0, metavar="N", help="how many of the nodes hold only engines (0)")
    add("--memory-gib", type=positive_float, metavar="GIB", help="memory of one GPU (that of the data sheet)")
    add(
        "--seq-len", type=positive_int, metavar="TOKENS", help="longest question with answer, in place of the settings'"
    )
    add("--mean-response-tokens", type=positive_int, metavar="N", help="for the times (a third of the longest)")
    add("--kept-share", type=_share, default=0.5, metavar="X", help="share of questions that are kept (0.5)")
    add(
        "--rollout-mode",
        action="append",
        default=[],
        choices=MODES,
        help="simulate a step in this mode (repeatable; synchronous is what training has today)",
    )
    add("--search", action="store_true", help="list every layout that fits, the shortest step first")
    add("--json", action="store_true", help="print JSON")
    add("overrides", nargs="*", metavar="key=value", help="for example policy.recompute=full")


def _cluster(args: argparse.Namespace) -> Cluster:
    if not 0 <= args.engine_nodes < args.nodes:
        raise ValueError(f"--engine-nodes {args.engine_nodes}: must be at least 0 and below --nodes {args.nodes}")
    chip = CHIPS[args.gpu]
    if args.memory_gib is not None:
        chip = replace(chip, memory_bytes=int(args.memory_gib * GIB))
    return Cluster(chip, args.nodes, args.gpus_per_node, args.engine_nodes)


def run(args: argparse.Namespace) -> int:
    """Print the plan. Returns the exit status (see the top of the file)."""
    try:
        cluster = _cluster(args)
        config = load_config(args.config, args.overrides)
        spec = read_architecture(config.model)
        if args.seq_len:
            config = with_seq_len(config, args.seq_len)
        check_positions(spec, config)
        work = Workload.of(config, args.mean_response_tokens, args.kept_share)
        plan = make_plan(spec, config, LayoutSettings.of(config), cluster, work)
        modes = [mode_time(mode, spec, config, plan.layout, cluster, work) for mode in args.rollout_mode]
    except (ConfigError, ValueError) as e:
        print(f"megatron-nft plan: {e}", file=sys.stderr)
        return 2
    found = search(spec, config, cluster, work) if args.search else None
    near = None if plan.fits else nearest(spec, config, plan.layout, cluster, work)
    if args.json:
        report = as_dict(spec, config, cluster, work, plan, near, found)
        print(json.dumps(report | ({"rollout_modes": [asdict(mode) for mode in modes]} if modes else {}), indent=1))
    else:
        print(as_text(spec, config, cluster, work, plan, near))
        if modes:
            print("\n" + mode_table(modes, work))
        if found is not None:
            print("\nLayouts that fit, the shortest step first:\n" + search_table(found, cluster))
    return 0 if plan.fits else 1
