#!/usr/bin/env python3
"""Turn a public question set into a file that `megatron-nft train` and `eval` read.

python tools/prepare_data.py math_train data/questions/train.parquet --from MATH/train.jsonl
"""

import sys

from megatron_nft.cli import main_of
from megatron_nft.data import prepare_command

if __name__ == "__main__":
    sys.exit(main_of(prepare_command, __doc__))
