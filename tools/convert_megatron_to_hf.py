#!/usr/bin/env python3
"""Turn a Megatron-Core checkpoint of any layout into a model folder in Hugging Face format.

CKPT is a torch_dist folder or a run's checkpoints/step_... folder. Sharded safetensors with index; config, generation
config, tokenizer and chat template come from --hf, else from what the checkpoint carries, else from the run's
model.path. One process; one parameter is held at a time.

    python tools/convert_megatron_to_hf.py run/checkpoints/step_000100 my-model --dtype bf16
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from megatron_nft.weights.offline.command import DTYPES, Reports, dtype_of, parser, run


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("ckpt", type=Path, metavar="CKPT", help="checkpoint to read")
    arguments.add_argument("out", type=Path, metavar="OUT", help="folder to make; must not exist")
    arguments.add_argument("--hf", type=Path, metavar="HF_DIR", help="folder with config.json and tokenizer")
    arguments.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the tensors; default: the checkpoint's own. fp32 takes the optimizer's master weights where there are",
    )
    arguments.add_argument("--max-file-gb", type=float, default=5.0, metavar="GB", help="size of a file (default 5)")
    args = arguments.parse_args()
    if not 0 < args.max_file_gb < math.inf:
        arguments.error(f"--max-file-gb {args.max_file_gb}: must be a number above 0")

    def work(reports: Reports):
        from megatron_nft.weights.offline.convert import megatron_to_hf

        return megatron_to_hf(args.ckpt, args.out, args.hf, dtype_of(args.dtype), int(args.max_file_gb * 1e9), reports)

    return run("converting", args.out, work)


if __name__ == "__main__":
    sys.exit(main())
