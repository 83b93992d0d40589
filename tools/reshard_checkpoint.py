#!/usr/bin/env python3
"""Change the layout of a training checkpoint, optimizer state included.

CKPT is a run's checkpoints/step_... folder, or a torch_dist folder. Values are copied bit for bit, so the next
optimizer step gives the same weights; random generator states belong to the old ranks and are left out. One process;
one parameter's part is held at a time.

    python tools/reshard_checkpoint.py run/checkpoints/step_000100 step_000100_tp8 --tp 8 --pp 2
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_nft.weights.offline.command import Reports, add_layout, parser, run


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("ckpt", type=Path, metavar="CKPT", help="checkpoint to read")
    arguments.add_argument("out", type=Path, metavar="OUT", help="folder to make; must not exist")
    add_layout(arguments)
    args = arguments.parse_args()

    def work(reports: Reports):
        from megatron_nft.weights.offline.megatron_writer import Grid
        from megatron_nft.weights.offline.reshard import reshard

        return reshard(args.ckpt, args.out, Grid(args.tp, args.pp, args.vpp), reports)

    return run("resharding", args.out, work)


if __name__ == "__main__":
    sys.exit(main())
