"""Submits the shipped scripts as a user would, and waits for what they do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster import PATIENCE_S, Cluster

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LAUNCH = ROOT / "launch_slurm"


@dataclass
class Launcher:
    """Submits a script of launch_slurm from the task's folder."""

    cluster: Cluster
    folder: Path

    def environment(self, **settings: str) -> dict[str, str]:
        base = {
            **self.cluster.env,
            "NFT_PYTHON": sys.executable,
            "NFT_CONFIG": "tiny.yaml",
            "NFT_PROCS_PER_NODE": "1",
            "NFT_NODES": "2",
            "NFT_GPU": "",
            "NFT_DOCTOR": "0",
            "NFT_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(HERE),
        }
        return base | settings

    def __call__(self, script: str, *arguments: str, cwd: Path | None = None, **settings: str):
        """Run the script outside a job: it checks and submits."""
        return subprocess.run(
            ["bash", str(LAUNCH / script), *arguments],
            env=self.environment(**settings),
            cwd=cwd or self.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def submit(self, script: str, *arguments: str, cwd: Path | None = None, **settings: str) -> str:
        """The same, and the job's id."""
        done = self(script, *arguments, cwd=cwd, **settings)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip().splitlines()[-1].rpartition(" ")[2]

    def output(self, job_id: str, cwd: Path | None = None) -> str:
        """What the job script itself printed, over all its starts."""
        (path,) = (cwd or self.folder).glob(f"*-{job_id}.out")
        return path.read_text()


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.1)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
