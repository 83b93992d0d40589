"""A private Slurm on this machine: own munge key, controller and daemons of many nodes, each with 8 pretend GPUs.

Needs root and Debian's `slurm-wlm` and `munge`; installs them where they are missing and apt answers. Everything it
starts is ended by process id, and nothing outside its folder is written. The daemons stay in the foreground as our
children, and the kernel ends them with us, however we end.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("sbatch", "scontrol", "srun", "scancel", "slurmctld", "slurmd", "munged")
PATIENCE_S = 600  # for what takes seconds on a quiet machine
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL"}

CONF = """ClusterName=nft
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/sock,cred_expire=3
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
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
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
SlurmctldParameters=node_reg_mem_percent=1
ReturnToService=1
SlurmdTimeout=10
SlurmctldTimeout=5
KillWait=5
MinJobAge=900
JobRequeue=1
BatchStartTimeout=5
MessageTimeout=20
GresTypes=gpu
PropagateResourceLimits=NONE
"""


def missing_reason() -> str | None:
    """Why Slurm cannot run here, after trying to install it; None when it can."""
    if os.geteuid() != 0:
        return "a private Slurm needs root"
    if all(shutil.which(p, path=search_path()) for p in PROGRAMS):
        return None
    if not shutil.which("apt-get"):
        return "Slurm is not installed and there is no apt-get"
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", "slurm-wlm", "munge"]
    for command in (install, ["apt-get", "update", "-q"], install):
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    if done.returncode or not all(shutil.which(p, path=search_path()) for p in PROGRAMS):
        return f"slurm-wlm cannot be installed: {done.stderr.strip()[-300:]}"
    return None


def search_path() -> str:
    """PATH with the folders that daemons live in."""
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _free_ports(count: int) -> int:
    """First of `count` ports in a row that nobody listens on."""
    for base in range(17000, 30000, count):
        try:
            for port in range(base, base + count):
                with socket.socket() as s:
                    s.bind(("127.0.0.1", port))
            return base
        except OSError:
            continue
    raise RuntimeError("no free range of ports")


class Cluster:
    """A running private Slurm. `close()` ends it."""

    def __init__(self, root: Path, num_nodes: int) -> None:
        self.root, self.num_nodes = root, num_nodes
        self._daemons: list[subprocess.Popen] = []
        self.nodes = [f"node{i}" for i in range(1, num_nodes + 1)]
        self.env = {**os.environ, "SLURM_CONF": str(root / "slurm.conf"), "PATH": search_path()}
        for name in list(self.env):
            if name.startswith(("SLURM_JOB", "SBATCH_", "NFT_")):
                del self.env[name]
        try:
            self._write()
            self._start()
        except BaseException:
            self.close()
            raise

    def _write(self) -> None:
        for folder in ("state", "spool", "log", "munge"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        os.chmod(self.root, 0o755)
        (self.root / "munge" / "key").write_bytes(os.urandom(128))
        (self.root / "munge" / "key").chmod(0o600)
        port = _free_ports(self.num_nodes + 1)
        host = socket.gethostname().split(".")[0]
        text = CONF.format(root=self.root, port=port)
        for i, node in enumerate(self.nodes):
            text += (
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + 1 + i} "
                "CPUs=64 RealMemory=1000000 Gres=gpu:8 State=UNKNOWN\n"
            )
        names = f"node[1-{self.num_nodes}]"
        text += f"PartitionName=batch Nodes={names} Default=YES MaxTime=INFINITE DefMemPerNode=0 State=UP\n"
        (self.root / "slurm.conf").write_text(text)
        # A GPU needs a device file; consoles are there on every machine and nothing opens them.
        gres = f"NodeName={names} Name=gpu File=/dev/tty[0-7] Flags=nvidia_gpu_env\n"
        (self.root / "gres.conf").write_text(gres)

    def _start(self) -> None:
        m, conf = self.root / "munge", str(self.root / "slurm.conf")
        files = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._daemon("munged", "--foreground", "--force", *(f"--{option}={m / name}" for option, name in files.items()))
        while not (m / "sock").exists():
            time.sleep(0.01)
        self._daemon("slurmctld", "-D", "-c", "-f", conf)
        for node in self.nodes:
            self._daemon("slurmd", "-D", "-N", node, "-f", conf)
        self.wait_idle(self.num_nodes)

    def _daemon(self, program: str, *arguments: str) -> None:
        log = (self.root / "log" / "daemons.log").open("ab")
        command = [shutil.which(program, path=search_path()) or program, *arguments]
        # Own session: Ctrl-C reaches pytest alone, whose fixture then closes the cluster in order.
        process = subprocess.Popen(
            command, env=self.env, stdout=log, stderr=log, start_new_session=True, preexec_fn=_die_with_parent
        )
        log.close()
        self._daemons.append(process)

    def wait_idle(self, count: int, timeout_s: float = PATIENCE_S) -> None:
        """Until `count` nodes are idle."""
        deadline = time.monotonic() + timeout_s
        while True:
            idle = set(self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).stdout.split())
            if len(idle) >= count:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(self.run("sinfo", "-N", "-l", check=False).stdout)
            time.sleep(0.1)

    def run(self, *command: str, check: bool = True, **options) -> subprocess.CompletedProcess[str]:
        """A Slurm command; every one has a time limit, because clients hang on a controller that is gone."""
        options = {"env": self.env, "capture_output": True, "text": True, "timeout": 60, **options}
        program = shutil.which(command[0], path=search_path()) or command[0]
        done = subprocess.run([program, *command[1:]], **options)
        if check and done.returncode:
            raise RuntimeError(f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done

    def job(self, job_id: str) -> dict[str, str]:
        """Fields of `scontrol show job`; of a heterogeneous job those of its first component."""
        text = self.run("scontrol", "show", "job", job_id).stdout.partition("\n\n")[0]
        # One field per line may hold spaces: it is the first of its line.
        return dict(re.findall(r"(\w+)=(\S*)", text)) | dict(
            re.findall(r"^ *(Command|StdOut|WorkDir)=(.*)$", text, re.M)
        )

    def wait(self, job_id: str, timeout_s: float = PATIENCE_S) -> dict[str, str]:
        """Until the job has ended, whatever number of starts that takes."""
        return self._until(job_id, lambda job: job["JobState"] in ENDED, "ended", timeout_s)

    def wait_start(self, job_id: str, restarts: int, timeout_s: float = PATIENCE_S) -> dict[str, str]:
        """Until the job runs for the `restarts` + 1st time."""

        def running(job: dict[str, str]) -> bool:
            return job["JobState"] == "RUNNING" and int(job["Restarts"]) >= restarts

        return self._until(job_id, running, f"running with {restarts} restarts", timeout_s)

    def _until(
        self, job_id: str, reached: Callable[[dict[str, str]], bool], what: str, timeout_s: float
    ) -> dict[str, str]:
        deadline = time.monotonic() + timeout_s
        while not reached(job := self.job(job_id)):
            if job["JobState"] in ENDED or time.monotonic() > deadline:
                output = Path(job["StdOut"]).read_text() if Path(job["StdOut"]).exists() else "(no output)"
                log = (self.root / "log" / "slurmctld.log").read_text().splitlines()[-30:]
                raise AssertionError(f"job {job_id} is not {what}: {job}\n{output}\n" + "\n".join(log))
            if job["JobState"] == "PENDING" and job["Restarts"] != "0":
                # Slurm holds a requeued job for minutes. Until the next second it would take the new start's
                # credential for one of the last start, which is revoked ("Killing non-startable batch").
                time.sleep(2)
                self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now", check=False)
            time.sleep(0.2)
        return job

    def processes(self, *words: str) -> list[int]:
        """Ids of the processes of this cluster whose environment or command line holds all of `words`.

        Daemons, their helpers and the tasks of jobs all carry this cluster's SLURM_CONF.
        """
        found = []
        conf = f"SLURM_CONF={self.root / 'slurm.conf'}"
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                text = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes().replace(b"\0", b" ")
            except OSError:
                continue
            if all(word.encode() in text for word in (conf, *words)):
                found.append(int(entry.name))
        return found

    def close(self) -> None:
        """Cancel all jobs, then end the daemons by their ids."""
        if len(self._daemons) > 1:
            self.run("scancel", "--user=root", check=False)
            deadline = time.monotonic() + 15
            while time.monotonic() < deadline and self.run("squeue", "-h", check=False).stdout.strip():
                time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        deadline = time.monotonic() + 10
        while self.processes() and time.monotonic() < deadline:
            for daemon in self._daemons:
                daemon.poll()  # reaps it
            time.sleep(0.05)
        for pid in self.processes():  # what a broken daemon left
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for daemon in self._daemons:
            daemon.wait()


def _die_with_parent() -> None:
    """Linux ends this process when its parent is gone: prctl(PR_SET_PDEATHSIG, SIGTERM)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
