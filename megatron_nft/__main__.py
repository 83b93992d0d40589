"""`python -m megatron_nft …` is `megatron-nft …`."""

import sys

from megatron_nft.cli import main

if __name__ == "__main__":
    sys.exit(main())
