"""The Triton kernels run in Triton's interpreter here, which has to be asked for before anything imports Triton.

Hypothesis tries the same examples everywhere and has no deadline: neither luck nor a busy machine decides.
"""

import os
from pathlib import Path

import hypothesis

hypothesis.settings.load_profile("ci")

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# What a terminal or a CI system may have set: the tests read tables and messages as they are without a terminal.
for name in ("COLUMNS", "FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)
