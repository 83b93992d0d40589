"""`megatron-nft convert hf-to-megatron`: from a model folder in Hugging Face format to a Megatron-Core checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_nft.arguments import describe
from megatron_nft.console import Progress
from megatron_nft.weights.offline.conversion import DTYPES, add_layout, dtype_of, run_conversion
from megatron_nft.weights.offline.summary import ConversionSummary

DETAILS = """
The checkpoint (torch_dist, weights only) is one that a job with the given layout would have written; Megatron-Core
loads it in any layout. Config and tokenizer are carried along in OUT/hf. One process; a rank's part of one parameter is
held at a time.

    %(prog)s Qwen2.5-Math-7B Qwen2.5-Math-7B-megatron --tp 2 --pp 2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    describe(parser, DETAILS)
    parser.add_argument("hf_dir", type=Path, metavar="HF_DIR", help="config.json, safetensors, tokenizer")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make; must not exist")
    add_layout(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="of the checkpoint; default: the folder's own")


def run(args: argparse.Namespace) -> int:
    """Convert; return the exit status of `run_conversion`."""

    def convert(progress: Progress) -> ConversionSummary:
        from megatron_nft.weights.offline.convert import hf_to_megatron
        from megatron_nft.weights.offline.megatron_writer import TargetLayout

        layout = TargetLayout(args.tp, args.pp, args.vpp)
        return hf_to_megatron(args.hf_dir, args.out, layout, dtype_of(args.dtype), progress)

    return run_conversion(args, "converting", args.out, convert)
