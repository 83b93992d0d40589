"""Memory of servers that share the trainer's GPU: released while the trainer works, taken back before a sync.

A released server answers /health but must not be asked to generate. Released weights come back empty, and the weight
sync that follows fills them. While servers are released none is started again: it would take the trainer's memory.

SGLang (`--enable-memory-saver`) has tags for what is released; 0.5.17 kills its scheduler when it is told to release
while requests run, or to resume what it has not released. vLLM (`--enable-sleep-mode`) has levels: its level 2 drops
weights and KV cache; its level 1 would copy the weights to the host, so for the KV cache alone 0.32 has a call of its
own, which wants a completed pause. Waking a vLLM server ends its pause as well.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from megatron_nft.engines.engine import EngineError

if TYPE_CHECKING:
    from megatron_nft.config import ServerConfig
    from megatron_nft.engines.server import Server, ServerGroup

Call = tuple[str, dict[str, Any] | None]
"""(path with its query, JSON body or none) of a POST."""


@dataclass(frozen=True)
class _Calls:
    """How one engine releases and takes back memory."""

    release: tuple[Call, ...]
    resume: tuple[Call, ...]


def _sglang(*tags: str) -> _Calls:
    body = {"tags": list(tags)}
    return _Calls((("/release_memory_occupation", body),), (("/resume_memory_occupation", body),))


CALLS = {
    ("sglang", "kv_cache"): _sglang("kv_cache"),
    ("sglang", "all"): _sglang("kv_cache", "weights"),
    ("vllm", "kv_cache"): _Calls(
        (("/pause?mode=wait", None), ("/release_kv_cache_memory", None)), (("/wake_up?tags=kv_cache", None),)
    ),
    ("vllm", "all"): _Calls((("/sleep?level=2&mode=wait", None),), (("/wake_up", None),)),
}
"""(rollout.engine, rollout.server.sleep_level) -> the calls."""
IDLE_POLL_S = 0.1
IDLE_TIMEOUT_S = 60.0


class SleepingServers:
    """The servers that this process started. `release` and `resume` alternate, beginning with `release`."""

    def __init__(self, group: ServerGroup, config: ServerConfig, engine: str) -> None:
        """engine: sglang | vllm."""
        self._group, self._calls = group, CALLS[engine, config.sleep_level]
        self._waits_itself = engine == "vllm"  # for requests that are still under way
        self._timeout_s = config.start_timeout_s
        self._released: dict[str, int] = {}  # url -> which start of the server it was

    def release(self) -> None:
        """Returns when the memory is free. All answers must have come."""
        self._group.hold()
        for server in self._group.servers:
            if server.exit_code() is not None:
                continue  # its memory is free; `resume` starts it again
            if not self._waits_itself:
                self._wait_idle(server)
            for call in self._calls.release:
                self._post(server, *call)
            self._released[server.url] = server.starts

    def resume(self) -> None:
        """Returns when every server has its memory, one that died in the meantime by a new start.

        EngineError where a server died and has no starts left, or does not take its memory back.
        """
        for server in self._group.servers:
            asleep = self._released.pop(server.url, None) == server.starts
            if server.exit_code() is not None:
                self._group.revive(server, self._timeout_s)
            elif asleep:
                for call in self._calls.resume:
                    self._post(server, *call)
        self._group.let_go()

    def _wait_idle(self, server: Server) -> None:
        """/flush_cache is refused while requests run; the last one may still be on its way out."""
        deadline = time.monotonic() + IDLE_TIMEOUT_S
        while not self._flushed(server):
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{server.name} at {server.url} still has requests under way {IDLE_TIMEOUT_S:.0f} s after the last "
                    f"answer; its memory cannot be released{server.log_tail()}"
                )
            time.sleep(IDLE_POLL_S)

    def _flushed(self, server: Server) -> bool:
        try:
            return httpx.post(f"{server.url}/flush_cache", timeout=self._timeout_s, trust_env=False).status_code == 200
        except httpx.TransportError as e:
            raise EngineError(self._failed(server, "/flush_cache", e)) from None

    def _post(self, server: Server, path: str, body: dict[str, Any] | None) -> None:
        try:
            answer = httpx.post(server.url + path, json=body, timeout=self._timeout_s, trust_env=False)
        except httpx.TransportError as e:
            raise EngineError(self._failed(server, path, e)) from None
        if answer.status_code != 200:
            asked = path if body is None else f"{path} {body}"
            raise EngineError(
                f"{server.name}: {asked}: HTTP {answer.status_code}: {answer.text[:500]}{server.log_tail()}"
            )

    def _failed(self, server: Server, path: str, error: Exception) -> str:
        code = server.exit_code()
        state = "is still running" if code is None else f"ended with exit code {code}"
        return (
            f"{server.name}: {path} was not answered ({error or type(error).__name__}); it {state}{server.log_tail()}"
        )
