"""Starting, watching and stopping inference servers.

A server runs below a supervisor (supervisor.py) in a session of its own. Invariants:
- when the process that started a server is gone, however it ended, the server and all it started end within seconds;
- only processes below our own supervisors are ended, by id;
- a server that died or hangs is started again on the same port, at most `max_restarts` times between two calls of
  `renew`, and then has no current weights. That it hangs, those say who ask it (owners.py);
- a server does not inherit what makes this process a rank of a job (processes.clean_environment).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx

from megatron_nft.engines import keys, supervisor
from megatron_nft.engines.engine import EngineError
from megatron_nft.engines.owners import Owners
from megatron_nft.processes import clean_environment, free_port

LOG_TAIL_LINES = 30
HEALTH_POLL_S = 0.25
STOP_TIMEOUT_S = supervisor.TERM_GRACE_S + 15.0


class Server:
    """One server process: command, port and log, over all its starts."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        host: str,
        address: str | None = None,
        environment: Mapping[str, str],
        log_path: Path,
        key: str | None = None,
    ) -> None:
        """`command` gets `--port=N` added; `environment` is added to our own, cleaned. Nothing is started yet.

        host: where it listens. address: where it is called, if not there. key: what it asks of its clients.
        """
        self.name, self.log_path = name, log_path
        self.port = free_port(host)
        self.url = f"http://{address or host}:{self.port}"
        self.starts, self.started_at = 0, 0.0  # on time.monotonic
        self.has_answered = False  # since its last start, when asked for its health
        self.starts_allowed = 1
        self.deaths: list[str] = []  # for error messages: exit code and end of the log, each time it died
        self.headers = keys.headers(key)
        self._command, self._environment = command, {**environment, **keys.environment(key)}
        self._supervisor: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process; `wait_healthy` tells when it answers."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-I", supervisor.__file__, str(os.getpid()), *self._command, f"--port={self.port}"]
        with open(self.log_path, "ab") as log:
            log.write(f"---- start {self.starts + 1} of {self.name}, port {self.port}\n".encode())
            log.flush()
            self._supervisor = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=clean_environment() | self._environment,
                start_new_session=True,
            )
        self.starts, self.started_at = self.starts + 1, time.monotonic()
        self.has_answered = False

    def exit_code(self) -> int | None:
        """None while it runs; the server's exit code, 128 + signal where one ended it."""
        return self._supervisor.poll() if self._supervisor else None

    def is_healthy(self) -> bool:
        """Ask /health once."""
        try:
            healthy = httpx.get(f"{self.url}/health", timeout=5.0, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False
        self.has_answered |= healthy
        return healthy

    def wait_healthy(self, timeout_s: float) -> None:
        """Returns once it answers. EngineError, with the end of the log, if it ends before or takes too long."""
        deadline = time.monotonic() + timeout_s
        while not self.is_healthy():
            code = self.exit_code()
            if code is not None:
                raise EngineError(f"{self.name} ended with exit code {code} before it answered{self.log_tail()}")
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{self.name} did not answer within {timeout_s:.0f} s (rollout.server.start_timeout_s)"
                    f"{self.log_tail()}"
                )
            time.sleep(HEALTH_POLL_S)

    def log_tail(self) -> str:
        """The last lines that the server wrote, for an error message."""
        try:
            lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
        except OSError as e:
            return f"; its log {self.log_path} cannot be read ({e.strerror})"
        return f"; the end of {self.log_path}:\n" + "\n".join(f"    {line}" for line in lines)

    def stop(self) -> None:
        """End the server and everything that it started; returns when they are gone. May be called twice."""
        if self._supervisor is None:
            return
        if self._supervisor.poll() is None:
            self._supervisor.send_signal(signal.SIGTERM)
            try:
                self._supervisor.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._supervisor.kill()  # its inner process then ends the rest
                self._supervisor.wait()


class ServerGroup:
    """The servers that this process started, and the thread that starts them again when they die."""

    def __init__(
        self,
        servers: Sequence[Server],
        *,
        start_timeout_s: float,
        max_restarts: int,
        owners: Owners | None = None,
        on_return: Callable[[str], None] | None = None,
    ) -> None:
        """Starts all servers at once and waits for them; on failure none is left. EngineError says which and why.

        owners: where ranks that this process does not hear otherwise say what they see. on_return: called with the URL
        of a server that was started again and answers, once more where it raises EngineError or httpx.HTTPError.
        """
        self.servers = list(servers)
        self._owners, self._on_return = owners, on_return
        self._max_restarts = max_restarts
        self._closed, self._held = threading.Event(), threading.Event()
        self._watch: threading.Thread | None = None
        self._hanging: dict[str, float] = {}  # URL -> seconds without progress
        self._starting = threading.Lock()
        self._noting = threading.Lock()  # both the watch and a caller of `failures` note deaths
        self.renew()
        atexit.register(self.close)
        try:
            for server in self.servers:
                if owners is not None:
                    owners.take_hanging(server.url)  # of an earlier run
                server.start()
            for server in self.servers:
                server.wait_healthy(start_timeout_s)
        except BaseException:
            self.close()
            raise
        self._watch = threading.Thread(target=self._revive, name="server-watch", daemon=True)
        self._watch.start()

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self.servers]

    def failures(self) -> str:
        """What happened to servers that died, with the ends of their logs; empty where none did."""
        self._note_deaths()
        return "\n".join(death for server in self.servers for death in server.deaths)

    def _note_deaths(self) -> None:
        with self._noting:
            for server in self.servers:
                code = server.exit_code()
                if code is not None and len(server.deaths) < server.starts:
                    server.deaths.append(f"{server.name} ended with exit code {code}{server.log_tail()}")

    def _revive(self) -> None:
        while not self._closed.wait(1.0):
            if self._owners is not None:
                self._hear(self._owners)
            self._end_those_that_hang()
            self._note_deaths()
            with self._starting:
                for server in self.servers if not self._held.is_set() else ():
                    if server.exit_code() is not None and server.starts < server.starts_allowed:
                        self._start_again(server)
            if self._on_return is not None:
                self._receive(self._on_return)

    def _start_again(self, server: Server) -> None:
        try:
            server.start()
        except OSError as e:  # no process or no log: the next look tries again
            server.starts += 1
            server.deaths.append(f"{server.name} could not be started: {e}")

    def _receive(self, on_return: Callable[[str], None]) -> None:
        for server in self.servers:
            if server.starts > 1 and not server.has_answered and server.exit_code() is None and server.is_healthy():
                try:
                    on_return(server.url)
                except (EngineError, httpx.HTTPError):
                    server.has_answered = False

    def _hear(self, owners: Owners) -> None:
        with contextlib.suppress(OSError):  # of the folder: the next look tries again
            for server in self.servers:
                quiet_s = owners.take_hanging(server.url)
                if quiet_s is not None:
                    self.end_hanging(server.url, quiet_s)
            if owners.hear_good_step():
                self.renew()

    def _end_those_that_hang(self) -> None:
        for server in self.servers:
            quiet_s = self._hanging.pop(server.url, None)
            # Several ranks may say it, some of them after it was started again.
            if quiet_s is None or server.exit_code() is not None or time.monotonic() - server.started_at < quiet_s:
                continue
            what = f"made no progress for {quiet_s:g} s (rollout.server.stall_timeout_s), and was ended"
            with self._noting:
                server.deaths.append(f"{server.name} {what}{server.log_tail()}")
            server.stop()

    def end_hanging(self, url: str, quiet_s: float) -> bool:
        """End the server at `url`, which made no progress for `quiet_s` seconds; it is then treated like one that died.

        Whether it is one of these.
        """
        if url not in self.urls:
            return False
        self._hanging[url] = quiet_s
        return True

    def renew(self) -> None:
        """From here on every server may be started again `max_restarts` times. Those that were given up stay so."""
        for server in self.servers:
            if server.exit_code() is None:
                server.starts_allowed = max(server.starts, 1) + self._max_restarts

    @property
    def given_up(self) -> bool:
        """Whether every server has died and none is started again."""
        return all(s.exit_code() is not None and s.starts >= s.starts_allowed for s in self.servers)

    def hold(self) -> None:
        """Start no dead server again until `let_go`; returns when none is being started."""
        self._held.set()
        with self._starting:
            pass

    def let_go(self) -> None:
        """End `hold`."""
        self._held.clear()

    def revive(self, server: Server, start_timeout_s: float) -> None:
        """Start a dead server and wait for it; call `hold` before. EngineError where its starts are used up."""
        self._note_deaths()
        if server.starts >= server.starts_allowed:
            raise EngineError(
                f"{server.deaths[-1]}\nIt was started again {self._max_restarts} times since the last good step "
                "(rollout.server.max_restarts)"
            )
        server.start()
        server.wait_healthy(start_timeout_s)

    def close(self) -> None:
        """Ends all servers. May be called twice."""
        self._closed.set()
        if self._watch is not None:
            self._watch.join()
        for server in self.servers:
            server.stop()
        atexit.unregister(self.close)
