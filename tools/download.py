#!/usr/bin/env python3
"""Download the published models and data sets, each file checked against the hub's own size and checksum.

python tools/download.py qwen2.5-math-7b dapo-math-17k validation --to data
"""

import sys

from megatron_nft.cli import main_of
from megatron_nft.data import download_command

if __name__ == "__main__":
    sys.exit(main_of(download_command, __doc__))
