"""`python -m sglang.launch_server ARGUMENTS`, closed to those who do not send the key in NFT_SERVER_KEY.

SGLang's own --api-key leaves /health_generate, /ready and /metrics open, of which the first asks the model for a token
and so wakes a sleeping engine. SGLang gets the key too, for the calls that it makes to itself, but not in its command
line, which every user of the machine can read.
"""

import runpy
import sys

import nft_guard

nft_guard.keep_key_out_of_logs()  # also in the processes that SGLang spawns, which import this file

if __name__ == "__main__":
    from sglang.srt.entrypoints import http_server

    http_server.app.add_middleware(nft_guard.KeyCheck)
    sys.argv.append(f"--api-key={nft_guard.KEY}")
    runpy.run_module("sglang.launch_server", run_name="__main__")
