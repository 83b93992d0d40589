"""Memory of servers that share the trainer's GPU: released while the trainer works, resumed before a weight sync.

A released server answers /health but must not be asked to generate. Released weights come back empty, and the weight
sync that follows fills them. While servers are released none is started again: it would take the trainer's memory.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from megatron_nft.engines.engine import EngineError
from megatron_nft.engines.reasons import reason

if TYPE_CHECKING:
    from megatron_nft.engines.server import Server, ServerGroup

Call = tuple[str, dict[str, Any] | None]
"""(path with its query, JSON body or None) of a POST."""

IDLE_POLL_S = 0.1
IDLE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class MemoryCalls:
    """How one kind of engine releases and resumes memory, at one `rollout.server.sleep_level`."""

    release: tuple[Call, ...]
    resume: tuple[Call, ...]
    refused_while_busy: str | None = None
    """A POST that tells when the server is idle, where `release` does not wait for running requests itself."""


class SleepingServers:
    """The servers that this process started. `release` and `resume` alternate, beginning with `release`."""

    def __init__(self, group: ServerGroup, calls: MemoryCalls, timeout_s: float) -> None:
        """timeout_s: limit for each call, and for the start of a server that died while it was released."""
        self._group, self._calls, self._timeout_s = group, calls, timeout_s
        self._released: dict[str, int] = {}  # url -> which start of the server was released

    def release(self) -> None:
        """Returns when the memory is free. All answers must have arrived. EngineError where a server refuses."""
        self._group.hold()
        for server in self._group.servers:
            if server.exit_code() is not None:
                continue  # its memory is free; `resume` starts it again
            if not (server.has_answered or server.is_healthy()):
                server.stop()  # it died in this step and is still starting: it cannot be told to sleep
                continue
            if self._calls.refused_while_busy is not None:
                self._wait_idle(server, self._calls.refused_while_busy)
            for path, body in self._calls.release:
                self._post(server, path, body)
            self._released[server.url] = server.starts

    def resume(self) -> None:
        """Returns when every server has its memory; one that died in the meantime is started again.

        EngineError where a server died and has no starts left, or does not take its memory back.
        """
        for server in self._group.servers:
            asleep = self._released.pop(server.url, None) == server.starts
            if server.exit_code() is not None:
                self._group.revive(server, self._timeout_s)
            elif asleep:
                for path, body in self._calls.resume:
                    self._post(server, path, body)
        self._group.let_go()

    def _wait_idle(self, server: Server, path: str) -> None:
        """Wait until `path` is no longer refused: the last request may still be on its way out."""
        deadline = time.monotonic() + IDLE_TIMEOUT_S
        while self._ask(server, path, None).status_code != 200:
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{server.name} at {server.url} still has requests under way {IDLE_TIMEOUT_S:.0f} s after the last "
                    f"answer; its memory cannot be released{server.log_tail()}"
                )
            time.sleep(IDLE_POLL_S)

    def _post(self, server: Server, path: str, body: dict[str, Any] | None) -> None:
        answer = self._ask(server, path, body)
        if answer.status_code != 200:
            asked = path if body is None else f"{path} {body}"
            raise EngineError(
                f"{server.name}: {asked}: HTTP {answer.status_code}: {answer.text[:500]}{server.log_tail()}"
            )

    def _ask(self, server: Server, path: str, body: dict[str, Any] | None) -> httpx.Response:
        try:
            return httpx.post(
                server.url + path, json=body, headers=server.headers, timeout=self._timeout_s, trust_env=False
            )
        except httpx.TransportError as error:
            code = server.exit_code()
            state = "is still running" if code is None else f"ended with exit code {code}"
            raise EngineError(
                f"{server.name}: {path} was not answered ({reason(error)}); it {state}{server.log_tail()}"
            ) from None
