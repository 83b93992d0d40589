#!/usr/bin/env python3
"""Turn a model folder in Hugging Face format into a Megatron-Core checkpoint (torch_dist, weights only).

python tools/convert_hf_to_megatron.py Qwen2.5-Math-7B Qwen2.5-Math-7B-megatron --tp 2 --pp 2
"""

import sys

from megatron_nft.cli import main_of
from megatron_nft.weights.offline import hf_to_megatron_command

if __name__ == "__main__":
    sys.exit(main_of(hf_to_megatron_command, __doc__))
