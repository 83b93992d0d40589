#!/usr/bin/env python3
"""Turn a model folder in Hugging Face format into a Megatron-Core checkpoint (torch_dist, weights only).

The checkpoint is one that a job with the given layout would have written; Megatron-Core loads it in any layout. Config
and tokenizer are carried along in OUT/hf. One process; a rank's part of one parameter is held at a time.

    python tools/convert_hf_to_megatron.py Qwen2.5-Math-7B Qwen2.5-Math-7B-megatron --tp 2 --pp 2
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_nft.weights.offline.command import DTYPES, Reports, add_layout, dtype_of, parser, run


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("hf_dir", type=Path, metavar="HF_DIR", help="config.json, safetensors, tokenizer")
    arguments.add_argument("out", type=Path, metavar="OUT", help="folder to make; must not exist")
    add_layout(arguments)
    arguments.add_argument("--dtype", choices=DTYPES, help="of the checkpoint; default: the folder's own")
    args = arguments.parse_args()

    def work(reports: Reports):
        from megatron_nft.weights.offline.convert import hf_to_megatron
        from megatron_nft.weights.offline.megatron_writer import Grid

        return hf_to_megatron(args.hf_dir, args.out, Grid(args.tp, args.pp, args.vpp), dtype_of(args.dtype), reports)

    return run("converting", args.out, work)


if __name__ == "__main__":
    sys.exit(main())
