"""Stops the ranks of a run at one moment, so that a test can signal them just there. Python imports it at its start.

NFT_TEST_HALT names the step, the phase and a path: "2 evaluate /tmp/halted". Each rank makes PATH-RANK when it is about
to begin that phase. It goes on when it has noted a stop signal, or once PATH-go is there.

In a save three more moments have names, and where the save goes on beside the training, it alone halts: "checkpoint",
when all files are written and the folder waits for its name; "writing", with half of each rank's tensors in its file;
and "full", where nothing halts and the disk is full.
"""

from __future__ import annotations

import errno
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


def halt_save(moment: str, path: str) -> None:
    """Change the next save."""
    store = sys.modules["megatron_nft.train.checkpoints"].CheckpointStore
    policy = sys.modules["megatron_nft.policy.checkpoint"]
    finish, write = store._finish, policy.write_pieces

    def half(pieces):
        pieces = list(pieces)
        yield from pieces[: len(pieces) // 2]
        if moment == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        halt(path)
        yield from pieces[len(pieces) // 2 :]

    if moment == "checkpoint":
        store._finish = lambda *args: (halt(path), finish(*args))
    else:
        policy.write_pieces = lambda file, pieces: write(file, half(pieces))


def install(step: str, phase: str, path: str) -> None:
    enter, moments = Phases.__call__, [phase]

    def halting(phases: Phases, name: str):
        if phase in ("checkpoint", "writing", "full"):
            if (str(phases.step), name) == (step, "checkpoint") and moments:
                halt_save(moments.pop(), path)
        elif (str(phases.step), name) == (step, phase):
            halt(path)
        return enter(phases, name)

    Phases.__call__ = halting


if "NFT_TEST_HALT" in os.environ:
    install(*os.environ["NFT_TEST_HALT"].split(" ", 2))
