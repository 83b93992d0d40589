"""`python -m sglang_router.launch_router ARGUMENTS`, which then asks for the key in NFT_SERVER_KEY itself.

Open without it are the router's own /health, /health_generate and the like, which reach no server. The key is not in
the command line, which every user of the machine can read.
"""

import os
import runpy
import sys

if __name__ == "__main__":
    sys.argv.append(f"--api-key={os.environ['NFT_SERVER_KEY']}")
    runpy.run_module("sglang_router.launch_router", run_name="__main__")
