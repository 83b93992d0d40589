"""`megatron-nft reshard`: a training checkpoint in another layout, optimizer state included."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_nft.arguments import describe
from megatron_nft.console import Progress
from megatron_nft.weights.offline.conversion import add_layout, run_conversion
from megatron_nft.weights.offline.summary import ConversionSummary

DETAILS = """
CKPT is a run's checkpoints/step_... folder, or a torch_dist folder. Values are copied bit for bit, so the next
optimizer step gives the same weights; random generator states belong to the old ranks and are left out. One process;
one parameter's part is held at a time.

    %(prog)s run/checkpoints/step_000100 step_000100_tp8 --tp 8 --pp 2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    describe(parser, DETAILS)
    parser.add_argument("ckpt", type=Path, metavar="CKPT", help="checkpoint to read")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make; must not exist")
    add_layout(parser)


def run(args: argparse.Namespace) -> int:
    """Reshard; return the exit status of `run_conversion`."""

    def convert(progress: Progress) -> ConversionSummary:
        from megatron_nft.weights.offline.megatron_writer import TargetLayout
        from megatron_nft.weights.offline.reshard import reshard

        return reshard(args.ckpt, args.out, TargetLayout(args.tp, args.pp, args.vpp), progress)

    return run_conversion(args, "resharding", args.out, convert)
