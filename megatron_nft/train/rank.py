"""One rank from start to end: opens the parts, trains, and turns every ending into a clear line and an exit status."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import traceback
import warnings
from contextlib import ExitStack
from typing import TYPE_CHECKING

from megatron_nft.config import Config, dump_config
from megatron_nft.console import Console
from megatron_nft.files import write_atomically
from megatron_nft.locks import FolderInUseError, HeldFolder, hold_folder
from megatron_nft.train import launch
from megatron_nft.train.launch import EXIT_INTERRUPTED, EXIT_REFUSED, EXIT_SAVED
from megatron_nft.train.lifecycle import Interrupted, Lifecycle, Phases, StopSignals, leave_at_once
from megatron_nft.train.whereabouts import LOST

if TYPE_CHECKING:
    from megatron_nft.policy.parallel import ParallelLayout

LIBRARIES = r"(megatron\.core|torch\.(distributed|utils|nn)|transformers)(\.|$)"
"""Modules whose warnings are meant for their own developers (deprecations, optional packages). Errors pass."""

COLLECTIVES = (f"{os.sep}torch{os.sep}distributed{os.sep}", f"{os.sep}megatron{os.sep}core{os.sep}")
"""Source folders in which ranks talk to each other."""


def run_rank(config: Config) -> int:
    """Train on this rank. Returns the exit status; see cli.py for its meaning."""
    warnings.filterwarnings("ignore", module=LIBRARIES)
    stop = StopSignals()  # before the heavy imports: a signal is remembered from the start
    rank = int(os.environ.get("RANK", 0))
    limits = config.train
    by_phase = limits.stall_timeout_by_phase.given()
    phases = Phases(rank, config.run_dir, limits.stall_timeout_s, by_phase, limits.heartbeat_s)
    life = Lifecycle(phases, stop, Console(rank))
    with ExitStack() as opened:
        opened.callback(life.close)
        try:
            with phases("start"):
                from megatron_nft.policy import parallel
                from megatron_nft.train.heartbeat import open_heartbeat
                from megatron_nft.train.loop import train
                from megatron_nft.train.parts import open_parts

                layout = parallel.initialize(config.policy, config.seed, limits.collective_timeout_s)
                beats = (limits.heartbeat_s, limits.heartbeat_timeout_s)
                if heartbeat := open_heartbeat(phases.where, layout.world_gloo, *beats):
                    phases.watch_others(heartbeat, limits.heartbeat_timeout_s)
                _refuse_bad_inputs(config, layout)
                if rank == 0:
                    opened.callback(_lock_run_folder(config).close)
                    write_resolved_config(config)
                parts, state = opened.enter_context(open_parts(config, layout, life))
            train(parts, state)
            phases.stop_watching_others()
            status = 0
        except Interrupted as e:
            status = EXIT_INTERRUPTED if e.signum == signal.SIGINT else EXIT_SAVED
        except InputsRefused as e:
            status = EXIT_REFUSED
            if rank == 0:
                print(f"megatron-nft train: {e}", file=sys.stderr, flush=True)
        except BaseException as e:
            status = 1
            _explain(e, phases)
    if status == 0:
        parallel.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    if status != 0:
        # Other ranks may be gone: leaving torch.distributed in order would wait for them.
        leave_at_once(status)
    return status


class InputsRefused(Exception):
    """Inputs that cannot be used; the same on every rank."""


def _refuse_bad_inputs(config: Config, layout: ParallelLayout) -> None:
    """InputsRefused on every rank for what rank 0 finds wrong, unless our launcher has looked already. Collective.

    torchrun and Slurm start ranks without looking.
    """
    from megatron_nft.distributed import gather_objects
    from megatron_nft.train.preflight import check_inputs

    problem = ""
    if layout.rank == 0 and launch.INPUTS_CHECKED not in os.environ:
        try:
            check_inputs(config)
        except (ValueError, OSError) as e:
            problem = str(e)
    problem = gather_objects(problem, layout.world_gloo)[0]
    if problem:
        raise InputsRefused(problem)


def _lock_run_folder(config: Config) -> HeldFolder:
    """Hold the run folder. ValueError where another run has it."""
    config.run_dir.mkdir(parents=True, exist_ok=True)  # under torchrun no preflight has made it
    try:
        return hold_folder(config.run_dir)
    except FolderInUseError:
        raise ValueError(f"run_dir {config.run_dir} is in use by another run; choose another or wait") from None


def write_resolved_config(config: Config) -> None:
    """Write run_dir/config.yaml. Other settings of an earlier start are kept as config.1.yaml, config.2.yaml, …"""
    path, text = config.run_dir / "config.yaml", dump_config(config)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        number = 1 + sum(1 for _ in config.run_dir.glob("config.*.yaml"))
        shutil.copyfile(path, config.run_dir / f"config.{number}.yaml")
    write_atomically(path, text)


def _explain(error: BaseException, phases: Phases) -> None:
    """Print the traceback where it helps, and then one last line that says who failed, where and why.

    A text of several lines, which may hold the end of a server's log, comes before the last line, which has its first.
    """
    text = str(error) or type(error).__name__
    if _is_failed_collective(error):
        who = phases.lost(timed_out=_is_time_out(text)) or "which ended or failed (its own message says why)"
        text = f"{LOST}, {who}: {text}"
    elif not isinstance(error, (ValueError, OSError, RuntimeError, KeyboardInterrupt)) or _is_unforeseen(error):
        traceback.print_exception(error)
    first, _, rest = text.partition("\n")
    phases.ended(f"{type(error).__name__}: {first}" if not text.startswith(LOST) else first)
    if rest:
        print(text, file=sys.stderr)
    print(f"megatron-nft: {phases}: {type(error).__name__}: {first.rstrip(':')}", file=sys.stderr, flush=True)


def _is_failed_collective(error: BaseException) -> bool:
    """A library's RuntimeError that was raised where ranks talk to each other. gloo's and NCCL's errors have no type
    of their own in common, so the place decides, not the text."""
    if type(error).__name__ == "CollectiveError":  # of distributed.py, whose import is a heavy one
        return True
    if not isinstance(error, RuntimeError) or type(error).__module__.startswith("megatron_nft"):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and any(folder in frames[-1].filename for folder in COLLECTIVES)


def _is_time_out(text: str) -> bool:
    """Whether a failed collective has waited for ranks, not lost a connection; gloo's and NCCL's texts alone say so."""
    return re.search(r"time[sd]?[ -]?out", text, re.IGNORECASE) is not None


def _is_unforeseen(error: BaseException) -> bool:
    """Whether the error needs its traceback: ours explain themselves, a library's plain RuntimeError does not."""
    return type(error) is RuntimeError or not type(error).__module__.startswith(("megatron_nft", "builtins"))
