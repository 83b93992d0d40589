"""The Triton kernels run in Triton's interpreter here, which has to be asked for before anything imports Triton."""

import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"
