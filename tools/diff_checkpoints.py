#!/usr/bin/env python3
"""Compare two sets of weights, each a Hugging Face folder or a Megatron checkpoint: names, shapes, values, checksums.

python tools/diff_checkpoints.py Qwen2.5-Math-7B Qwen2.5-Math-7B-megatron
"""

import sys

from megatron_nft.cli import main_of
from megatron_nft.weights.offline import diff_command

if __name__ == "__main__":
    sys.exit(main_of(diff_command, __doc__))
