"""Starts Python scripts by forking a process that has imported torch, megatron-core and transformers.

Those imports take a rank of a distributed test five seconds or more of CPU time, and a run of the tests starts a
hundred ranks. A `ForkServer` runs this file as a process of its own. That process imports `MODULES` once, then forks
a process for each script that it is asked to run. A forked script has the environment, arguments, output file, session
and `__main__` that it would have if Python had been started for it.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

# What takes long to import. Nothing of our own, so that each rank still imports the package by itself; nothing that
# starts a thread at its import (pyarrow does), because forking would lose it.
MODULES = (
    "torch",
    "torch.distributed",
    "numpy",
    "pytest",
    "httpx",
    "pydantic",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "megatron.core",
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
)


# --- in the process that uses the server ------------------------------------------------------------------------------


class ForkServer:
    """The server process. It ends, with all that it has forked, when its user closes it or dies."""

    def __init__(self, env: dict[str, str]) -> None:
        """Does not wait for the imports; the first `start` does. `env`, the environment of the server, must have
        OMP_NUM_THREADS=1: OpenBLAS starts its threads when it is loaded."""
        self._connection, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, str(Path(__file__).resolve()), str(theirs.fileno())]
            self._process = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
            )
        self._answers = self._connection.makefile("r")
        self.pid = self._process.pid
        atexit.register(self.close)

    def start(self, script: Path, args: tuple[str, ...], env: dict[str, str], log: Path) -> ForkedProcess:
        """Run `script` as `__main__` in a new process, a session of its own, with all its output in the file `log`."""
        request = {"script": str(script), "args": args, "env": env, "log": str(log)}
        return ForkedProcess(self, self._ask(request))

    def poll(self, pid: int) -> int | None:
        """The exit code of a forked process (negative: the signal that ended it), None while it runs."""
        return self._ask({"poll": pid})

    def _ask(self, request: dict[str, object]) -> int | None:
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        answer = self._answers.readline()
        if not answer:
            raise RuntimeError(f"the fork server ended with exit code {self._process.wait()}; its error is on stderr")
        return json.loads(answer)

    def close(self) -> None:
        self._answers.close()
        self._connection.close()
        self._process.wait()


class ForkedProcess:
    """The part of subprocess.Popen that the launcher needs."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._server = server

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.poll(self.pid)
        return self.returncode

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.01)
        return code


# --- in the server ----------------------------------------------------------------------------------------------------


def serve(connection: socket.socket) -> dict | None:
    """Answer requests until the user hangs up, which gives None. In a forked process it returns its request."""
    running: set[int] = set()
    with connection, connection.makefile("r") as lines:
        for line in lines:
            request = json.loads(line)
            if "poll" in request:
                pid, status = os.waitpid(request["poll"], os.WNOHANG)
                running.discard(pid)
                answer = os.waitstatus_to_exitcode(status) if pid else None
            elif answer := fork():
                running.add(answer)
            else:
                return request
            connection.sendall(json.dumps(answer).encode() + b"\n")
    for pid in running:
        os.killpg(pid, signal.SIGKILL)
    return None


def fork() -> int:
    """os.fork, with the new process in a session of its own before this returns: its group can be killed at once."""
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise RuntimeError(f"one of MODULES has started {threads - 1} threads, which a forked process would lose")
    ready, mark = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.close(ready)
    os.close(mark)
    if pid:
        os.read(ready, 1)  # ends when the other process has closed `mark`
        os.close(ready)
    return pid


def run(request: dict) -> None:
    """What Python does when it is started with a script."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = [request["script"], *request["args"]]
    sys.path[0] = str(Path(request["script"]).parent)
    runpy.run_path(request["script"], run_name="__main__")


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    for name in MODULES:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    request = serve(connection)
    if request is not None:
        run(request)


if __name__ == "__main__":
    main()
