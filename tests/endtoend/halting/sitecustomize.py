"""Stops the ranks of a run at one moment, so that a test can signal them just there. Python imports it at its start.

NFT_TEST_HALT names the step, the phase and a path: "2 evaluate /tmp/halted". Each rank makes PATH-RANK when it is about
to begin that phase, or, in the phase "checkpoint", when all files are written and the folder waits for its name. It
goes on when it has noted a stop signal, or once PATH-go is there.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from megatron_nft.train.lifecycle import Phases


def halt(path: str) -> None:
    stop = signal.getsignal(signal.SIGTERM).__self__  # lifecycle.StopSignals
    open(f"{path}-{os.environ['RANK']}", "w").close()
    while not stop.signum and not os.path.exists(f"{path}-go"):
        time.sleep(0.01)


def install(step: str, phase: str, path: str) -> None:
    enter = Phases.__call__

    def halting(phases: Phases, name: str):
        if (str(phases.step), name) == (step, phase):
            if phase == "checkpoint":
                store = sys.modules["megatron_nft.train.checkpoints"].CheckpointStore
                finish = store._finish
                store._finish = lambda *args: (halt(path), finish(*args))
            else:
                halt(path)
        return enter(phases, name)

    Phases.__call__ = halting


if "NFT_TEST_HALT" in os.environ:
    install(*os.environ["NFT_TEST_HALT"].split(" ", 2))
