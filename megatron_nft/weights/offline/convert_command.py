"""`megatron-nft convert`: weights between Hugging Face folders and Megatron-Core checkpoints, either way."""

from __future__ import annotations

import argparse

from megatron_nft.weights.offline import hf_to_megatron_command, megatron_to_hf_command

DIRECTIONS = {
    "hf-to-megatron": (hf_to_megatron_command, "from a model folder to a checkpoint of any layout"),
    "megatron-to-hf": (megatron_to_hf_command, "from a checkpoint of any layout to a model folder"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the two directions, each with its options."""
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    for name, (module, text) in DIRECTIONS.items():
        module.add_arguments(directions.add_parser(name, help=text, description=text[0].upper() + text[1:] + "."))


def run(args: argparse.Namespace) -> int:
    """Convert in the direction that was named; return the exit status."""
    module, _ = DIRECTIONS[args.direction]
    status: int = module.run(args)
    return status
