#!/usr/bin/env python3
"""Turn a Megatron-Core checkpoint of any layout into a model folder in Hugging Face format.

python tools/convert_megatron_to_hf.py run/checkpoints/step_000100 my-model --dtype bf16
"""

import sys

from megatron_nft.cli import main_of
from megatron_nft.weights.offline import megatron_to_hf_command

if __name__ == "__main__":
    sys.exit(main_of(megatron_to_hf_command, __doc__))
