"""Which ranks a run has: those that torchrun or Slurm started, or local ones that we start ourselves.

The local launcher imports no torch. It starts `num_processes` copies of its own command line with torchrun's
environment variables, passes signals on, and ends the others when one fails.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from megatron_nft.processes import THREADS, die_with_parent, free_port, set_own_variable

GRACE_S = 30.0  # for the other ranks to end by themselves once one has failed
EXIT_SAVED = 75  # EX_TEMPFAIL: state is saved, run the same command again
EXIT_INTERRUPTED = 130
EXIT_REFUSED = 2  # settings or inputs that cannot be used; a second try would end the same way
INPUTS_CHECKED = "NFT_INPUTS_CHECKED"  # variable: `preflight.check_inputs` passed before the ranks were started


def adopt_slurm_environment() -> bool:
    """Set torchrun's variables from those of an `srun` step with several tasks; False where there is none.

    The port is derived from the job and step id, so that jobs on one node do not meet.
    """
    env = os.environ
    if "RANK" in env or not env.get("SLURM_STEP_ID", "").isdigit() or int(env.get("SLURM_STEP_NUM_TASKS", 1)) < 2:
        return False
    hosts = subprocess.run(
        ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.split()
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
    env["LOCAL_RANK"] = env["SLURM_LOCALID"]
    env.setdefault("MASTER_ADDR", hosts[0])
    env.setdefault("MASTER_PORT", str(20000 + (int(env["SLURM_JOB_ID"]) * 7 + int(env["SLURM_STEP_ID"])) % 40000))
    return True


def joined() -> bool:
    """True in a process that is a rank already."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start_local(command: Sequence[str], num_processes: int) -> int:
    """Run `command` as ranks 0 .. num_processes - 1 on this machine and return the exit status of the run.

    0 when every rank ended with 0; EXIT_SAVED or EXIT_INTERRUPTED when all the failed ones say so; else 1.
    """
    base = {**os.environ, "WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    threads = str(max(1, len(os.sched_getaffinity(0)) // num_processes))
    for name, value in (THREADS, threads), ("GLOO_SOCKET_IFNAME", "lo"):
        if name not in base:
            set_own_variable(name, value, base)
    ranks: list[subprocess.Popen[bytes]] = []

    def forward(signum: int, _frame: object) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(signum)

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    previous = {s: signal.signal(s, forward) for s in signals}
    try:
        for i in range(num_processes):
            # Own sessions: Ctrl-C in a terminal reaches the ranks once, through `forward`.
            env = {**base, "RANK": str(i), "LOCAL_RANK": str(i)}
            ranks.append(subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=die_with_parent))
        return _wait(ranks)
    finally:
        _end(ranks)
        for s, handler in previous.items():
            signal.signal(s, handler)


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    failed_at = None
    while any(r.poll() is None for r in ranks):
        if failed_at is None and any(r.poll() for r in ranks):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > GRACE_S:
            break
        time.sleep(0.05)
    codes = [r.poll() for r in ranks]
    for i, code in enumerate(codes):
        if code is not None and code < 0:
            print(f"megatron-nft: rank {i} was ended by {signal.Signals(-code).name}", file=sys.stderr)
    bad = {c for c in codes if c != 0}
    if not bad:
        return 0
    return next((c for c in (EXIT_SAVED, EXIT_INTERRUPTED) if bad == {c}), 1)


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    """End the ranks that are left, politely and then not, by their own ids."""
    for sig, patience_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        deadline = time.monotonic() + patience_s
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(sig)
        while any(r.poll() is None for r in ranks) and time.monotonic() < deadline:
            time.sleep(0.05)
