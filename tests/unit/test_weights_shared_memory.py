"""What a process that made shared memory leaves behind: nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from processes import wait_until

MAKES = """
import warnings
warnings.filterwarnings("ignore")
import torch
from megatron_nft.weights.shared_memory import shared_buffer
buffer = shared_buffer(1 << 20, torch.device("cpu"))
buffer.fill_(1)
helper_socket, file, _ = buffer.untyped_storage()._share_filename_cpu_()
print(helper_socket.decode(), "/dev/shm" + file.decode(), flush=True)
input()
"""


def test_nothing_is_left_at_exit(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("s")  # short: the path of a socket holds 107 characters
    with subprocess.Popen(
        [sys.executable, "-c", MAKES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    ) as process:
        helper_socket, file = process.stdout.readline().split()
        assert Path(helper_socket).is_relative_to(tmp_path) and Path(helper_socket).exists()
        assert Path(file).stat().st_size >= 1 << 20
        process.communicate("\n", timeout=60)
    assert process.returncode == 0
    left = [Path(file), Path(helper_socket).parent]
    wait_until(lambda: not any(path.exists() for path in left), what="the end of the file and the helper's folder")
