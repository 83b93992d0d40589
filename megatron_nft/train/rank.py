"""One rank from start to end: opens the parts, runs the loop, and turns every ending into a clear line and a status."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import traceback
import warnings
from typing import NoReturn

from megatron_nft.config import Config
from megatron_nft.console import Console
from megatron_nft.train.lifecycle import Interrupted, Phases, StopSignals
from megatron_nft.train.launch import EXIT_INTERRUPTED, EXIT_SAVED

LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")


LIBRARIES = r"(megatron\.core|torch\.(distributed|utils|nn)|transformers)(\.|$)"
"""Their warnings are for their developers (deprecations, optional packages); errors are not touched."""


def run_rank(config: Config) -> int:
    """Train on this rank. Returns the exit status; see cli.py for its meaning."""
    warnings.filterwarnings("ignore", module=LIBRARIES)
    stop = StopSignals()  # before the heavy imports: a signal is remembered from the start
    rank = int(os.environ.get("RANK", 0))
    phases = Phases(rank, config.run_dir, config.train.stall_timeout_s)
    console = Console(rank)
    trainer = None
    try:
        with phases("start"):
            from megatron_nft.train.loop import train
            from megatron_nft.policy import parallel
            from megatron_nft.train.parts import open_trainer, write_resolved_config

            layout = parallel.initialize(config.policy, config.seed)
            if rank == 0:
                _lock_run_folder(config)
                write_resolved_config(config)
            trainer = open_trainer(config, layout, phases, stop, console)
        train(trainer)
        status = 0
    except Interrupted as e:
        status = _save_and_leave(trainer, e, console, phases)
    except BaseException as e:
        status = 1
        _explain(e, phases)
    finally:
        _close(trainer, console, phases)
    if status == 0:
        parallel.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    if status != 0:
        # Other ranks may be gone: leaving torch.distributed in order would wait for them.
        _leave_at_once(status)
    return status


def _leave_at_once(status: int) -> NoReturn:
    """os._exit, which skips atexit: torch's helper for shared memory would live on and keep our output open."""
    if "torch" in sys.modules:
        from megatron_nft.weights.shared_memory import clean_up

        clean_up()
    os._exit(status)


def _lock_run_folder(config: Config) -> None:
    """Held for as long as the process lives; a second run on the same folder is an error."""
    config.run_dir.mkdir(parents=True, exist_ok=True)  # under torchrun nobody has looked at it yet
    fd = os.open(config.run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)  # closed with the process
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"run_dir {config.run_dir} is in use by another run; choose another or wait") from None


def _save_and_leave(trainer, interrupted: Interrupted, console: Console, phases: Phases) -> int:
    """After a stop signal: save the last complete step. Status 130 for Ctrl-C, 75 else."""
    try:
        if trainer is not None and trainer.state.step:
            with phases("checkpoint"):
                folder = trainer.save()
            console.say(f"{interrupted}: step {trainer.state.step} is saved in {folder}; run the same command to go on")
        else:
            console.say(f"{interrupted} before the first step was complete; nothing to save")
    except BaseException as e:
        _explain(e, phases)
        return 1
    return EXIT_INTERRUPTED if interrupted.signum == signal.SIGINT else EXIT_SAVED


def _explain(error: BaseException, phases: Phases) -> None:
    """The traceback goes first where it is of use; the last line says who, where and what."""
    text = str(error) or type(error).__name__
    if any(t in text for t in LOST_PEER) and not isinstance(error, OSError):
        text = "lost the connection to another rank, which ended or failed (its own message says why)"
    elif not isinstance(error, (ValueError, OSError, RuntimeError, KeyboardInterrupt)) or _is_unforeseen(error):
        traceback.print_exception(error)
    print(f"megatron-nft: {phases}: {type(error).__name__}: {text}", file=sys.stderr, flush=True)


def _is_unforeseen(error: BaseException) -> bool:
    """Our own errors explain themselves; a plain RuntimeError out of a library does not."""
    return type(error) is RuntimeError or not type(error).__module__.startswith(("megatron_nft", "builtins"))


def _close(trainer, console: Console, phases: Phases) -> None:
    try:
        if trainer is not None:
            trainer.close()
        else:
            console.close()
            phases.close()
    except Exception as e:
        print(f"megatron-nft: {phases}: while closing: {type(e).__name__}: {e}", file=sys.stderr)
