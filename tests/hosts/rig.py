"""Several hosts on one Linux machine, for tests of runs on many hosts.

    with Rig(2) as rig:
        first, second = rig.hosts
        first.run("ping", "-c1", "-W5", "h2")
        server = second.start(sys.executable, "server.py", stdout=log)
        second.cut()       # its cable is pulled: packets are lost in silence
        second.heal()
        second.slow(100_000)  # bytes per second, in each direction, until it is healed
        second.kill()      # every process of the host ends at once, as in a crash; the host itself stays

A host has its own network, host name, /etc/hosts, process ids, System V IPC and /dev/shm. It shares the processors and
every other file, as if the disk were the cluster's file system. Hosts are called h1, h2, … and have the addresses
10.77.0.1, 10.77.0.2, … on a switch of their own, with no way to anything else.

Nothing has a name outside: no interface, no file, no named namespace. Each host lives as long as its first process,
which ends when our end of a pipe closes, so that the kernel removes everything with us, however we end. Rigs side by
side do not see each other.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import pytest

from megatron_nft.processes import die_with_parent

PROGRAMS = ("ip", "tc", "unshare", "nsenter", "bash", "timeout")
NETWORK = "10.77.0"
RUN_TIMEOUT_S = 60.0
BURST_BYTES = 32_768
"""What a slow cable passes at once after it was idle."""
QUEUE_S = 0.4  # packets that would have to wait longer are lost, as in a switch whose buffer is full

FIRST_PROCESS = """
set -e
hostname "$1"
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs tmpfs /mnt
printf '%s\\n' "$2" >/mnt/hosts
mount --bind /mnt/hosts /etc/hosts
umount --lazy /mnt
ip link set lo up
echo ready
read -r || true
"""
SWITCH = "ip link add switch type bridge; ip link set switch up; echo ready; read -r || true"


class RigError(RuntimeError):
    """Hosts that cannot be made here."""


class _Keeper:
    """The process that keeps some namespaces alive, and the way into them."""

    def __init__(self, kinds: tuple[str, ...], script: str, *arguments: str) -> None:
        command = ["unshare", *(f"--{kind}" for kind in kinds), "bash", "-c", script, "keeper", *arguments]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the tests alone
            preexec_fn=die_with_parent,
        )
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            _, told = self.process.communicate()
            raise RigError(told.strip() or f"unshare ended with {self.process.returncode}")

    @property
    def pid(self) -> int:
        return self.process.pid

    def close(self) -> None:
        """Returns when every process in the namespaces is gone."""
        self.process.communicate()  # closes its standard input


class Host:
    """One host of a rig."""

    def __init__(self, number: int, switch: _Keeper, keeper: _Keeper) -> None:
        self.number, self.name, self.address = number, f"h{number}", f"{NETWORK}.{number}"
        self._switch, self._keeper = switch, keeper

    def start(self, *command: str | Path, env: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen:
        """Start a command on the host, in the current folder. `options` are those of Popen.

        The process is nsenter's; it ends with the status of the command, but passes no signals on.
        """
        pid = self._keeper.pid
        enter = ["nsenter", f"--target={pid}", "--net", "--uts", "--ipc", "--mount"]
        enter += [f"--pid=/proc/{pid}/ns/pid_for_children", "--", "env", "-C", os.getcwd()]
        options.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.Popen([*enter, *map(str, command)], env=None if env is None else dict(env), **options)

    def run(self, *command: str | Path, timeout_s: float = RUN_TIMEOUT_S, check: bool = True, **options: Any) -> str:
        """Run a command on the host and return what it wrote. CalledProcessError, with the output, where it fails."""
        limited = ["timeout", "--kill-after=5", str(timeout_s), *map(str, command)]
        process = self.start(*limited, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
        output, _ = process.communicate(timeout=timeout_s + 30)
        if check and process.returncode:
            raise subprocess.CalledProcessError(process.returncode, limited, output)
        return output

    def processes(self) -> dict[int, str]:
        """Id on the host and command line of each process, without the host's first one and without zombies."""
        listing = ("ps", "-ww", "-eo", "pid=,stat=,args=")
        with self.start(*listing, stdout=subprocess.PIPE, text=True) as ps:
            rows = [line.strip().split(None, 2) for line in ps.stdout]
        return {int(p): args for p, state, args in rows if p != "1" and state[0] != "Z" and args != " ".join(listing)}

    def kill(self) -> None:
        """SIGKILL to every process of the host."""
        self.start("bash", "-c", "kill -KILL -- -1 || true").wait(RUN_TIMEOUT_S)

    def cut(self) -> None:
        """Pull the cable of the host. It still reaches itself."""
        self._set_port("down")

    def slow(self, bytes_per_s: int) -> None:
        """Limit what the host sends, and what it is sent, to this many bytes per second, after BURST_BYTES at once."""
        limit = ("tbf", "rate", f"{bytes_per_s}bps", "burst", f"{BURST_BYTES}b", "latency", f"{QUEUE_S}s")
        self._set_queues(*limit)  # bps: tc's bytes per second

    def heal(self) -> None:
        """Put the cable back, at full speed."""
        self._set_queues("noqueue")
        self._set_port("up")

    def queue(self) -> dict[str, Any]:
        """Queueing discipline of what the host sends, with its settings and its counters, as tc tells them."""
        (found,) = json.loads(self.run("tc", "-s", "-j", "qdisc", "show", "dev", "eth0"))
        return found

    def connect(self) -> None:
        """Give the host its interface and address, and a cable to the switch."""
        _inside(
            self._switch,
            "ip",
            "link",
            "add",
            f"port{self.number}",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            str(self._keeper.pid),
        )
        _inside(self._switch, "ip", "link", "set", f"port{self.number}", "master", "switch", "up")
        _inside(self._keeper, "ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        _inside(self._keeper, "ip", "link", "set", "eth0", "up")

    def _set_queues(self, *kind: str) -> None:
        """Queueing discipline of both ends of the cable. Each limits what is sent from it."""
        for keeper, device in (self._switch, f"port{self.number}"), (self._keeper, "eth0"):
            _inside(keeper, "tc", "qdisc", "replace", "dev", device, "root", *kind)

    def _set_port(self, state: str) -> None:
        _inside(self._switch, "ip", "link", "set", f"port{self.number}", state)


def _inside(keeper: _Keeper, *command: str) -> None:
    """Run a short command in the keeper's network."""
    done = subprocess.run(
        ["nsenter", f"--target={keeper.pid}", "--net", *command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode:
        raise RigError(f"{' '.join(command)}: {done.stderr.strip()}")


class Rig:
    """Two to four hosts. A context manager; RigError where they cannot be made. See the module."""

    def __init__(self, num_hosts: int) -> None:
        self._num_hosts = num_hosts
        self.hosts: list[Host] = []

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            switch = _Keeper(("net",), SWITCH)
            opened.callback(switch.close)
            names = range(1, self._num_hosts + 1)
            table = "\n".join(["127.0.0.1 localhost", *(f"{NETWORK}.{i} h{i}" for i in names)])
            kinds = ("net", "uts", "ipc", "mount", "pid", "fork", "kill-child", "mount-proc")
            for number in names:
                keeper = _Keeper(kinds, FIRST_PROCESS, f"h{number}", table)
                opened.callback(keeper.close)
                self.hosts.append(Host(number, switch, keeper))
                self.hosts[-1].connect()
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()


@functools.cache
def missing_reason() -> str | None:
    """Why there can be no rig here, after trying to install what it needs; None where there can."""
    if os.geteuid() != 0:
        return "hosts in network namespaces need root"
    if not all(map(shutil.which, PROGRAMS)):
        if not shutil.which("apt-get"):
            return f"one of {', '.join(PROGRAMS)} is not installed and there is no apt-get"
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", "iproute2", "util-linux"]
        for command in (install, ["apt-get", "update", "-q"], install):
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
        if not all(map(shutil.which, PROGRAMS)):
            return f"iproute2 cannot be installed: {done.stderr.strip()[-300:]}"
    try:
        with Rig(2):
            return None
    except RigError as e:
        return f"no network namespaces here: {e}"


def need_hosts() -> None:
    """Skip the test, with the reason, where there can be no rig; with NFT_REQUIRE_HOSTS=1 fail it."""
    if reason := missing_reason():
        if os.environ.get("NFT_REQUIRE_HOSTS") == "1":
            pytest.fail(f"NFT_REQUIRE_HOSTS=1, but {reason}")
        pytest.skip(reason)
