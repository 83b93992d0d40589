"""A Slurm whose nodes are the hosts of a rig, each with an address, a slurmd and a munged of its own.

    with HostSlurm(hosts, folder) as slurm:
        job = slurm.run("sbatch", "--parsable", …).strip()

slurmctld runs on the first host. `tests/slurm/cluster.py` has a Slurm of many nodes on one host.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from rig import Host

sys.path.append(str(Path(__file__).resolve().parents[1] / "slurm"))
from cluster import ENDED, PATIENCE_S, missing_reason, search_path

CONF = """ClusterName=hosts
SlurmctldHost={first}({first_address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/local/munge.sock
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/local/spool
SlurmctldPidFile={root}/local/slurmctld.pid
SlurmdPidFile={root}/local/slurmd.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=20
InactiveLimit=0
KillWait=5
JobRequeue=1
MessageTimeout=30
PropagateResourceLimits=NONE
GresTypes=gpu
"""


class HostSlurm:
    """A running Slurm on hosts; it ends with them. See the module."""

    missing_reason = staticmethod(missing_reason)

    def __init__(self, hosts: Sequence[Host], root: Path) -> None:
        self.hosts, self.root = hosts, root
        self.env = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM_", "SBATCH_", "NFT_"))}
        self.env |= {"SLURM_CONF": str(root / "slurm.conf"), "PATH": search_path()}
        self.env.pop("GLOO_SOCKET_IFNAME", None)
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> Self:
        for folder in ("state", "log", "local"):
            (self.root / folder).mkdir(parents=True)
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        first = self.hosts[0]
        text = CONF.format(root=self.root, first=first.name, first_address=first.address)
        text += "".join(
            f"NodeName={h.name} NodeHostname={h.name} NodeAddr={h.address} "
            "CPUs=4 RealMemory=4000 Gres=gpu:8 State=UNKNOWN\n"
            for h in self.hosts
        )
        names = ",".join(h.name for h in self.hosts)
        text += f"PartitionName=batch Nodes={names} Default=YES MaxTime=INFINITE DefMemPerNode=0 State=UP\n"
        (self.root / "slurm.conf").write_text(text)
        # As in cluster.py: consoles in the place of GPUs, which nothing opens.
        gres = f"NodeName={names} Name=gpu File=/dev/tty[0-7] Flags=nvidia_gpu_env\n"
        (self.root / "gres.conf").write_text(gres)
        for host in self.hosts:
            local = self.root / "local"
            host.run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", local)  # the host's own, and gone with it
            host.run("mkdir", local / "spool")
            files = {
                "socket": "munge.sock",
                "pid-file": "munge.pid",
                "seed-file": "munge.seed",
                "log-file": "munge.log",
            }
            given = [f"--{option}={local / name}" for option, name in files.items()]
            self._daemon(host, "munged", "--foreground", "--force", f"--key-file={key}", *given)
            host.run("bash", "-c", f"until [ -S {local}/munge.sock ]; do sleep 0.05; done")
        self._daemon(first, "slurmctld", "-D", "-c", "-f", self.root / "slurm.conf")
        for host in self.hosts:
            self._daemon(host, "slurmd", "-D", "-N", host.name, "-f", self.root / "slurm.conf")
        self.wait(lambda: len(self._idle()) == len(self.hosts), "all nodes idle")
        return self

    def __exit__(self, *_: object) -> None:
        self.run("scancel", "--user=root", check=False)
        for host in self.hosts:
            host.kill()
        for daemon in self._daemons:
            daemon.wait()

    def _daemon(self, host: Host, program: str, *arguments: str | Path) -> None:
        with (self.root / "log" / f"{host.name}.log").open("ab") as log:
            self._daemons.append(host.start(program, *arguments, env=self.env, stdout=log, stderr=log))

    def _idle(self) -> set[str]:
        return set(self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).split())

    def run(self, *command: str | Path, check: bool = True, env: Mapping[str, str] | None = None) -> str:
        """What a command on the first host wrote."""
        try:
            return self.hosts[0].run(*command, timeout_s=120, check=check, env={**self.env, **(env or {})})
        except subprocess.CalledProcessError as e:
            raise AssertionError(f"{command[0]} ended with {e.returncode}: {e.output}") from None

    def job(self, number: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", number)))

    def wait_job(self, number: str, reached: Callable[[dict[str, str]], Any], what: str) -> dict[str, str]:
        """Until the job is as wanted; a job that was put back into the queue is not held there."""

        def look() -> dict[str, str] | None:
            job = self.job(number)
            if reached(job):
                return job
            if job["JobState"] == "PENDING" and job["Restarts"] != "0":
                time.sleep(2)  # see cluster.py
                self.run("scontrol", "update", f"JobId={number}", "StartTime=now", check=False)
            assert job["JobState"] not in ENDED, f"job {number} has ended before {what}: {job}"
            return None

        return self.wait(look, what)

    def wait(self, condition: Callable[[], Any], what: str, timeout_s: float = 3 * PATIENCE_S) -> Any:
        """What the condition gives once that is true; AssertionError with the end of the controller's log."""
        deadline = time.monotonic() + timeout_s
        while not (found := condition()):
            if time.monotonic() > deadline:
                log = (self.root / "log" / "slurmctld.log").read_text().splitlines()[-30:]
                raise AssertionError(f"{what}: not within {timeout_s:.0f} s\n" + "\n".join(log))
            time.sleep(0.3)
        return found
