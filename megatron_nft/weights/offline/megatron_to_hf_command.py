"""`megatron-nft convert megatron-to-hf`: from a Megatron-Core checkpoint to a model folder in Hugging Face format."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_nft.arguments import describe, positive_float
from megatron_nft.console import Progress
from megatron_nft.weights.offline.conversion import DTYPES, dtype_of, run_conversion
from megatron_nft.weights.offline.summary import ConversionSummary

DETAILS = """
CKPT is a torch_dist folder of any layout or a run's checkpoints/step_... folder. OUT gets sharded safetensors with an
index; config, generation config, tokenizer and chat template come from --hf, else from what the checkpoint carries,
else from the run's model.path. One process; one parameter is held at a time.

    %(prog)s run/checkpoints/step_000100 my-model --dtype bf16
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    describe(parser, DETAILS)
    parser.add_argument("ckpt", type=Path, metavar="CKPT", help="checkpoint to read")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make; must not exist")
    parser.add_argument("--hf", type=Path, metavar="HF_DIR", help="folder with config.json and tokenizer")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the tensors; default: the checkpoint's own. fp32 takes the optimizer's master weights where there are",
    )
    parser.add_argument(
        "--max-file-gb", type=positive_float, default=5.0, metavar="GB", help="size of a file (default 5)"
    )


def run(args: argparse.Namespace) -> int:
    """Convert; return the exit status of `run_conversion`."""

    def convert(progress: Progress) -> ConversionSummary:
        from megatron_nft.weights.offline.convert import megatron_to_hf

        max_file_bytes = int(args.max_file_gb * 1e9)
        return megatron_to_hf(args.ckpt, args.out, args.hf, dtype_of(args.dtype), max_file_bytes, progress)

    return run_conversion(args, "converting", args.out, convert)
