"""The rig itself: hosts of their own, joined by a cable that can be pulled, and nothing left of them."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import pytest
import rig
from processes import wait_until
from rig import BURST_BYTES, Host, Rig, missing_reason, need_hosts

ECHO = """
import socket, sys
listener = socket.create_server((sys.argv[1], 15000))
open(sys.argv[2], "w").close()
while True:
    listener.accept()[0].close()
"""

SEND = """
import socket, sys
sent = open(sys.argv[2], "rb").read()
with socket.create_server((sys.argv[1], 15000)) as listener:
    open(sys.argv[3], "w").close()
    listener.accept()[0].sendall(sent)
"""
RECEIVE = """
import hashlib, socket, sys, time
start = time.monotonic()
with socket.create_connection((sys.argv[1], 15000), timeout=60) as connection:
    found = b"".join(iter(lambda: connection.recv(65536), b""))
print(hashlib.sha256(found).hexdigest(), time.monotonic() - start)
"""


def sent(sender: Host, receiver: Host, data: Path) -> tuple[str, float]:
    """SHA-256 of what arrives of the file's bytes, and the seconds of it by the receiver's clock."""
    listens = data.with_suffix(".listens")
    listens.unlink(missing_ok=True)
    sender.start(sys.executable, "-c", SEND, sender.address, data, listens)
    wait_until(listens.exists)
    digest, seconds = receiver.run(sys.executable, "-c", RECEIVE, sender.address).split()
    return digest, float(seconds)


def reaches(host: Host, address: str) -> str:
    """How a connection from the host to port 15000 of `address` ends: "" where it is made."""
    code = f"import socket; socket.create_connection(({address!r}, 15000), timeout=3).close()"
    return host.run(sys.executable, "-c", code, check=False).strip().rpartition("\n")[2]


def test_each_host_has_its_own_name_addresses_memory_and_processes(hosts):
    first, second = hosts
    for host in hosts:
        assert (
            host.run("hostname").strip() == host.run(sys.executable, "-c", "import os; print(os.uname().nodename)")[:-1]
        )
        assert host.run("hostname").strip() == host.name
        assert f"inet {host.address}/24 " in host.run("ip", "address", "show", "dev", "eth0")
    first.run("touch", "/dev/shm/of-the-first")
    assert second.run("ls", "/dev/shm") == ""
    assert first.run("getent", "hosts", "h2").split() == [second.address, "h2"]
    sleeper = second.start("sleep", "1000")
    wait_until(lambda: list(second.processes().values()) == ["sleep 1000"])
    assert first.processes() == {}
    second.kill()
    assert sleeper.wait(60) == -signal.SIGKILL
    assert second.processes() == {}
    assert second.run("hostname").strip() == "h2"  # the host itself is still there


def test_the_root_of_the_machine_sees_nothing_of_it(hosts):
    assert "10.77.0" not in subprocess.run(["ip", "address"], capture_output=True, text=True, check=True).stdout
    assert "tmpfs /mnt" not in Path("/proc/mounts").read_text()
    assert "h1" not in Path("/etc/hosts").read_text()
    assert "Network is unreachable" in reaches(hosts[0], "192.0.2.1")


def test_a_cable_that_is_pulled_and_put_back(hosts, tmp_path):
    first, second = hosts
    second.start(sys.executable, "-c", ECHO, "0.0.0.0", tmp_path / "listens")
    wait_until((tmp_path / "listens").exists)
    assert reaches(first, "h2") == ""
    assert "refused" in reaches(first, "127.0.0.1")  # the loopback of another host is another machine's
    second.cut()
    assert "timed out" in reaches(first, "h2")
    assert reaches(second, "127.0.0.1") == reaches(second, second.address) == ""
    second.heal()
    wait_until(lambda: reaches(first, "h2") == "", what="the way to h2")


def test_a_cable_that_is_slow_in_both_directions(hosts, tmp_path):
    """A transfer takes no less than its bytes over the limit, but for the first burst. Once the cable is healed
    nothing limits it: no time would show that on a busy machine."""
    first, second = hosts
    data = tmp_path / "data"
    data.write_bytes(os.urandom(400_000))
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    second.slow(200_000)
    for sender, receiver in (first, second), (second, first):
        found, seconds = sent(sender, receiver, data)
        assert found == digest
        assert seconds >= (400_000 - BURST_BYTES) / 200_000, sender.name
    limited = second.queue()
    assert (limited["kind"], limited["options"]["rate"], limited["options"]["burst"]) == ("tbf", 200_000, BURST_BYTES)
    assert limited["bytes"] >= 400_000 and limited["overlimits"] > 0
    assert first.queue()["kind"] == "noqueue"  # the other cable is as it was
    second.heal()
    assert second.queue()["kind"] == "noqueue"
    assert sent(first, second, data)[0] == sent(second, first, data)[0] == digest


def test_a_command_that_fails_or_takes_too_long(hosts):
    with pytest.raises(subprocess.CalledProcessError) as failed:
        hosts[0].run("bash", "-c", "echo why; exit 7")
    assert (failed.value.returncode, failed.value.output) == (7, "why\n")
    with pytest.raises(subprocess.CalledProcessError) as late:
        hosts[0].run("sleep", "1000", timeout_s=0.2)
    assert late.value.returncode == 124
    assert hosts[0].processes() == {}


HOLDER = """
    import os, sys, time
    sys.path[:0] = {path!r}
    from rig import Rig
    with Rig(2) as rig:
        stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)"
        for host in rig.hosts:
            host.start(sys.executable, "-c", stubborn, {mark!r})
            while not any({mark!r} in line for line in host.processes().values()):
                time.sleep(0.05)
        print("up", flush=True)
        {end}
"""


@pytest.mark.parametrize("end", ["raises", "SIGTERM", "SIGKILL"])
def test_nothing_is_left_behind(tmp_path, end):
    need_hosts()
    mark = f"mark-{uuid.uuid4()}"
    networks, mounts = namespaces(), Path("/proc/mounts").read_text()
    code = textwrap.dedent(HOLDER).format(
        path=sys.path, mark=mark, end="raise ValueError" if end == "raises" else "time.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as holder:
        assert holder.stdout.readline() == b"up\n"
        if end != "raises":
            assert len(holders_of(mark)) >= 2
            assert len(namespaces() - networks) >= 3  # two hosts and the switch
            holder.send_signal(getattr(signal, end))
        holder.wait(60)
    wait_until(lambda: not holders_of(mark), what="the end of the hosts' processes")
    wait_until(lambda: not namespaces() - networks, what="the end of the hosts' networks")
    assert Path("/proc/mounts").read_text() == mounts


def namespaces() -> set[str]:
    """The networks of all processes."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.add(os.readlink(entry))
        except OSError:
            continue
    return found


def holders_of(mark: str) -> list[str]:
    """Processes that have `mark` among their arguments, without the one that makes the rig."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark in entry.read_text().split("\0"):
                found.append(entry.parent.name)
        except OSError:
            continue
    return found


def test_rigs_side_by_side_do_not_meet(hosts, tmp_path):
    with Rig(3) as other:
        other.hosts[1].start(sys.executable, "-c", ECHO, "0.0.0.0", tmp_path / "listens")
        wait_until((tmp_path / "listens").exists)
        assert reaches(other.hosts[2], "h2") == ""
        assert "refused" in reaches(hosts[0], "h2")


def test_what_cannot_be_made_says_why(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "root" in missing_reason.__wrapped__()
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "/nowhere")
    assert "is not installed" in missing_reason.__wrapped__()


def test_a_rig_that_has_to_be_there_is_no_skip(monkeypatch):
    monkeypatch.setattr(rig, "missing_reason", lambda: "there are no namespaces")
    monkeypatch.delenv("NFT_REQUIRE_HOSTS", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"^there are no namespaces$"):
        need_hosts()
    monkeypatch.setenv("NFT_REQUIRE_HOSTS", "1")
    with pytest.raises(pytest.fail.Exception, match="NFT_REQUIRE_HOSTS=1, but there are no namespaces"):
        need_hosts()
