"""The Triton kernels run in Triton's interpreter here, which has to be asked for before anything imports Triton.

Hypothesis tries the same examples everywhere and has no deadline: neither luck nor a busy machine decides.
"""

import os
import sys
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.load_profile("ci")

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# What a terminal or a CI system may have set: the tests read tables and messages as they are without a terminal.
for name in ("COLUMNS", "FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)


@pytest.fixture(scope="module", autouse=True)
def no_process_group_is_left():
    """A file that joins ranks leaves them: which other files run in its process depends on the workers' load."""
    yield
    if "torch.distributed" in sys.modules:
        assert not sys.modules["torch.distributed"].is_initialized(), "this file has left a process group behind"
