"""Starting, watching and stopping server processes, with small servers that misbehave as real ones do."""

import functools
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from processes import alive, below, children, server_of, wait_until

from megatron_nft.engines import supervisor
from megatron_nft.engines.engine import EngineError
from megatron_nft.engines.server import Server, ServerGroup

# Answers /health, after starting a child, and a grandchild that leaves its session and parent and ignores TERM.
SERVER = textwrap.dedent(
    """
    import http.server, os, signal, subprocess, sys, tempfile, time
    tempfile.mkstemp()  # left behind, as engines leave their sockets
    port = int(sys.argv[-1].removeprefix("--port="))
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    if "family" in sys.argv:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        if os.fork() == 0:
            os.setsid()
            subprocess.Popen([sys.executable, "-c", stubborn])
            os._exit(0)
        os.wait()
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/die":
                os._exit(7)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(str(os.getpid()).encode())
        def log_message(self, *args):
            pass
    print("serving", flush=True)
    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
    """
)


def temporary_folder(server: int) -> Path:
    """The one that the process was started with; it must not be everybody's."""
    variables = dict(v.split("=", 1) for v in Path(f"/proc/{server}/environ").read_text().split("\0") if v)
    folder = Path(variables["TMPDIR"])
    assert folder != Path(tempfile.gettempdir()) and list(folder.iterdir())
    return folder


FAMILY = 5  # supervisor (two processes), server, child, stubborn grandchild


def make_server(tmp_path, *arguments, code=SERVER, name="test server"):
    command = [sys.executable, "-c", code, *arguments]
    return Server(name, command, host="127.0.0.1", environment={"MARK": "1"}, log_path=tmp_path / "logs" / "server.log")


@pytest.fixture
def ours():
    """Processes below this one that the test started: servers of other tests may be running."""
    before = below(os.getpid())
    return lambda: below(os.getpid()) - before


def group(*servers, timeout=120.0, restarts=0):
    return ServerGroup(servers, start_timeout_s=timeout, max_restarts=restarts)


def test_stop_ends_the_whole_family(tmp_path, ours):
    servers = group(make_server(tmp_path, "family"))
    wait_until(lambda: len(ours()) >= FAMILY)
    family = ours()
    (outer,) = (p for p in children(os.getpid()) if p in family)
    folder = temporary_folder(server_of(outer))
    servers.close()
    servers.close()
    assert not alive(family) and not folder.exists()
    assert "serving" in (tmp_path / "logs" / "server.log").read_text()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_family_ends_when_the_starter_is_killed(tmp_path, signum):
    starter = textwrap.dedent(
        f"""
        import sys, time
        sys.path[:0] = {sys.path!r}
        from pathlib import Path
        import test_engines_server as t
        servers = t.group(t.make_server(Path({str(tmp_path)!r}), "family"))
        print("up", flush=True)
        time.sleep(600)
        """
    )
    with subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"up\n"
        wait_until(lambda: len(below(process.pid)) >= FAMILY)
        family = below(process.pid)
        process.send_signal(signum)
        process.wait(60)
        wait_until(lambda: not alive(family))


@pytest.mark.parametrize("which", ["outer", "inner", "server"])
def test_family_goes_with_a_killed_supervisor_or_server(tmp_path, ours, which):
    """vLLM's engine core outlives its API server in the same way as the stubborn grandchild here."""
    servers = group(make_server(tmp_path, "family"))
    wait_until(lambda: len(ours()) >= FAMILY)
    family = ours()
    (outer,) = (p for p in children(os.getpid()) if p in family)
    (inner,) = children(outer)
    folder = temporary_folder(server_of(outer))
    os.kill({"outer": outer, "inner": inner, "server": server_of(outer)}[which], signal.SIGKILL)
    wait_until(lambda: not alive(family))
    servers.close()
    wait_until(lambda: not folder.exists())


def test_a_process_that_lost_its_first_thread_hides_nobody():
    """It is called a zombie, and has a thread and a child. So has a big server for a moment when it is killed."""
    program = textwrap.dedent(
        """
        import ctypes, os, subprocess, sys, threading, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        threading.Thread(target=time.sleep, args=(600,)).start()
        print(child.pid, flush=True)
        exit_of_this_thread = {"x86_64": 60, "aarch64": 93}[os.uname().machine]
        ctypes.CDLL(None).syscall(exit_of_this_thread, 0)
        """
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        child = int(process.stdout.readline())
        try:
            stat = Path(f"/proc/{process.pid}/stat")
            wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z")
            assert {process.pid, child} <= set(supervisor.descendants(os.getpid()))
        finally:
            os.kill(child, signal.SIGKILL)
            process.kill()
        process.wait(60)
        assert process.pid not in supervisor.descendants(os.getpid())


def test_a_server_does_not_take_itself_for_a_rank(tmp_path, monkeypatch):
    """With torchrun's variables its own init_process_group would wait for a store that nobody opens."""
    rank = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK")
    rank += ("ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
    rank += ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RUN_ID")
    others = ("NCCL_SOCKET_IFNAME", "CUDA_VISIBLE_DEVICES", "https_proxy", "HF_HOME", "MASTER_KEY", "RANKING")
    for name in (*rank, *others):
        monkeypatch.setenv(name, "1")
    servers = group(make_server(tmp_path))
    try:
        (supervisor_pid,) = (p for p in children(os.getpid()) if "supervisor.py" in command_line(p))
        text = Path(f"/proc/{server_of(supervisor_pid)}/environ").read_text()
        inherited = dict(v.split("=", 1) for v in text.split("\0") if v)
        assert not inherited.keys() & set(rank)
        assert {name: inherited.get(name) for name in others} == dict.fromkeys(others, "1")
        assert inherited["MARK"] == "1" and inherited["PATH"] == os.environ["PATH"]
    finally:
        servers.close()


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def test_early_exit_is_told_with_the_end_of_the_log(tmp_path, ours):
    code = "print('line one'); raise SystemExit('no such model')"
    with pytest.raises(EngineError, match=r"(?s)test server ended with exit code 1 .*line one.*no such model"):
        group(make_server(tmp_path, code=code))
    assert not ours()


def test_missing_interpreter_is_told(tmp_path):
    server = Server("s", ["/nowhere/python"], host="127.0.0.1", environment={}, log_path=tmp_path / "log")
    with pytest.raises(EngineError, match=r"(?s)ended with exit code 1.*/nowhere/python"):
        group(server)


def test_one_that_never_answers_is_ended(tmp_path, ours):
    with pytest.raises(EngineError, match=r"did not answer within 1 s \(rollout.server.start_timeout_s\)"):
        group(make_server(tmp_path, code="import time; time.sleep(600)"), timeout=1.0)
    assert not ours()


def test_failure_of_one_ends_the_others(tmp_path, ours):
    good, bad = make_server(tmp_path), make_server(tmp_path, code="raise SystemExit(3)", name="bad server")
    with pytest.raises(EngineError, match="bad server ended with exit code 3"):
        group(good, bad)
    assert not ours()


def test_one_that_died_is_started_again_within_the_bound(tmp_path, ours):
    import httpx

    server = make_server(tmp_path)
    servers = group(server, restarts=1)
    try:
        get = functools.partial(httpx.get, trust_env=False, timeout=60)  # no proxy
        first = get(server.url).text
        with pytest.raises(httpx.TransportError):
            get(server.url + "/die")
        wait_until(server.is_healthy)
        assert get(server.url).text != first  # another process on the same port
        assert "ended with exit code 7" in servers.failures()
        with pytest.raises(httpx.TransportError):
            get(server.url + "/die")
        wait_until(lambda: servers.given_up)  # the bound is used up
        assert server.exit_code() == 7
        assert servers.failures().count("ended with exit code 7") == 2
    finally:
        servers.close()
    assert not ours()


def test_one_that_was_started_again_is_told_its_version_once_it_answers(tmp_path):
    """vLLM has no argument for it: without this an evaluation would not ask it again."""
    told = []

    def set_version(url):
        told.append(url)
        if len(told) == 1:
            raise EngineError("not yet")

    server = make_server(tmp_path)
    servers = ServerGroup([server], start_timeout_s=120.0, max_restarts=1, on_return=set_version)
    try:
        assert told == []
        os.kill(server_of(server._supervisor.pid), signal.SIGKILL)
        wait_until(lambda: len(told) == 2, 120, "the version")
        wait_until(lambda: server.has_answered)
        assert told == [server.url] * 2
    finally:
        servers.close()


def test_one_that_hangs_is_ended_and_started_again_and_good_steps_renew_the_bound(tmp_path):
    """Twice with a bound of one restart: the second time only because a step was completed in between."""
    servers = group(make_server(tmp_path), restarts=1)
    (server,) = servers.servers
    try:
        for starts in (2, 3):
            assert servers.end_hanging(server.url, 0.1)
            wait_until(lambda n=starts: server.starts == n and server.is_healthy(), 120, "a new start")
            assert "made no progress for 0.1 s (rollout.server.stall_timeout_s), and was ended" in server.deaths[-1]
            assert not servers.given_up
            servers.renew()
        os.kill(server_of(server._supervisor.pid), signal.SIGKILL)
        wait_until(lambda: server.starts == 4 and server.is_healthy(), 120, "the last start")
        os.kill(server_of(server._supervisor.pid), signal.SIGKILL)
        wait_until(lambda: servers.given_up, 120, "the end of the bound")
        assert server.starts == 4
    finally:
        servers.close()
