#!/usr/bin/env python3
"""Change the layout of a training checkpoint, optimizer state included.

python tools/reshard_checkpoint.py run/checkpoints/step_000100 step_000100_tp8 --tp 8 --pp 2
"""

import sys

from megatron_nft.cli import main_of
from megatron_nft.weights.offline import reshard_command

if __name__ == "__main__":
    sys.exit(main_of(reshard_command, __doc__))
