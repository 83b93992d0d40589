"""Commands under real torchrun, on one host or on several."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rig import Host

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
HALTING = TESTS / "endtoend" / "halting"
MASTER_PORT = 15999
WAIT_S = 600.0


def torchrun(*arguments: str | Path) -> list[str]:
    """torchrun with its options and a script, or `-m` and a module."""
    return [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    """For ranks: one thread each; our package and the helpers of tests/ can be imported."""
    path = [ROOT, TESTS, TESTS / "hosts", *([HALTING] if "NFT_TEST_HALT" in more else [])]
    return {
        **{name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"},
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": ":".join(map(str, path)),
        **more,
    }


class TorchRun:
    """One torchrun on each host, `ranks` ranks under each, with the output of host hN in FOLDER/hN.log."""

    def __init__(
        self,
        hosts: Sequence[Host],
        ranks: int,
        folder: Path,
        *command: str | Path,
        env: Mapping[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.hosts, self._folder = hosts, folder
        self._agents: list[subprocess.Popen] = []
        for number, host in enumerate(hosts):
            options = [f"--nnodes={len(hosts)}", f"--nproc-per-node={ranks}", f"--node-rank={number}"]
            options += [f"--master-addr={hosts[0].name}", f"--master-port={MASTER_PORT}"]
            with (folder / f"{host.name}.log").open("wb") as log:
                agent = host.start(
                    *torchrun(*options, *command), env=environment(**env or {}), stdout=log, stderr=subprocess.STDOUT
                )
            self._agents.append(agent)

    def wait(self, timeout_s: float = WAIT_S) -> list[int]:
        """Exit statuses, once torchrun has ended on every host. AssertionError, with the output, if one does not."""
        deadline = time.monotonic() + timeout_s
        for agent in self._agents:
            try:
                agent.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"torchrun did not end within {timeout_s} s:\n{self.text}") from None
        return [agent.returncode for agent in self._agents]

    @property
    def ended(self) -> bool:
        """Whether a torchrun has ended."""
        return any(agent.poll() is not None for agent in self._agents)

    def output(self, host: Host) -> str:
        """What the host's ranks and its torchrun wrote."""
        return (self._folder / f"{host.name}.log").read_text(errors="replace")

    @property
    def text(self) -> str:
        """The output of all hosts."""
        return "\n".join(f"--- {host.name}\n{self.output(host)}" for host in self.hosts)

    def last_line(self, host: Host) -> str:
        """The last line that the ranks of the host wrote about themselves; torchrun's own report comes after it."""
        return [line for line in self.output(host).splitlines() if line.startswith("megatron-nft: ")][-1]
