"""Release and resume of engine memory, with small servers that behave as SGLang's scheduler does."""

from __future__ import annotations

import sys
import textwrap
from types import SimpleNamespace

import httpx
import pytest
from processes import wait_until

from megatron_nft.config import ServerConfig
from megatron_nft.engines import sleep
from megatron_nft.engines.engine import EngineError
from megatron_nft.engines.server import Server, ServerGroup
from megatron_nft.engines.sglang.client import SGLangEngine
from megatron_nft.engines.sglang.memory import MEMORY_CALLS as SGLANG
from megatron_nft.engines.sleep import SleepingServers
from megatron_nft.engines.vllm.memory import MEMORY_CALLS as VLLM

# As in SGLang 0.5.17: a release while requests run, or a resume of what is not released, ends the scheduler.
SERVER = textwrap.dedent(
    """
    import http.server, json, os, sys
    port = int(sys.argv[-1].removeprefix("--port="))
    state = {"released": [], "busy": int(sys.argv[1]), "calls": []}
    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, code, body):
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body.encode())
        def do_GET(self):
            self.answer(200, json.dumps(state | {"pid": os.getpid()}))
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            state["calls"].append(self.path)
            if self.path == "/die":
                os._exit(7)
            if self.path == "/flush_cache":
                state["busy"] -= 1
                return self.answer(200 if state["busy"] < 0 else 400, "")
            tags = json.loads(body)["tags"]
            if "refuse" in sys.argv:
                return self.answer(400, "no memory saver here")
            if self.path == "/release_memory_occupation":
                if state["busy"] >= 0:
                    os._exit(8)
                state["released"] += tags
            else:
                for tag in tags:
                    if tag not in state["released"]:
                        os._exit(9)
                    state["released"].remove(tag)
            self.answer(200, "")
        def log_message(self, *args):
            pass
    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
    """
)

# As in vLLM 0.32 (entrypoints/serve/dev, v1/engine/core.py, v1/executor/abstract.py): level 2 drops both tags, the KV
# cache alone only after a pause and while all is resident, a wake-up names tags that sleep, and the last one unpauses.
VLLM_SERVER = textwrap.dedent(
    """
    import http.server, json, os, sys, urllib.parse
    port = int(sys.argv[-1].removeprefix("--port="))
    state = {"released": [], "paused": False, "calls": []}
    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, code, body):
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body.encode())
        def do_GET(self):
            self.answer(200, json.dumps(state | {"pid": os.getpid()}))
        def do_POST(self):
            url = urllib.parse.urlsplit(self.path)
            query = urllib.parse.parse_qs(url.query)
            state["calls"].append(self.path)
            if url.path in ("/pause", "/sleep") and query["mode"] != ["wait"]:
                return self.answer(422, "mode")
            if url.path == "/pause":
                state["paused"] = True
            elif url.path == "/sleep" and query["level"] == ["2"]:
                state.update(paused=True, released=["kv_cache", "weights"])
            elif url.path == "/release_kv_cache_memory":
                if not state["paused"] or state["released"]:
                    return self.answer(500, "requires a completed pause first")
                state["released"] = ["kv_cache"]
            elif url.path == "/wake_up":
                for tag in query.get("tags", list(state["released"])):
                    state["released"].remove(tag)
                state["paused"] = bool(state["released"])
            else:
                return self.answer(404, "")
            self.answer(200, "{}")
        def log_message(self, *args):
            pass
    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
    """
)


@pytest.fixture
def start(tmp_path):
    groups = []

    def make(*arguments: str, number=1, restarts=1, busy=0, program=SERVER, calls=SGLANG, sleep_level="all"):
        servers = [
            Server(
                f"server {i}",
                [sys.executable, "-c", program, str(busy), *arguments],
                host="127.0.0.1",
                environment={},
                log_path=tmp_path / f"server{i}.log",
            )
            for i in range(number)
        ]
        groups.append(ServerGroup(servers, start_timeout_s=120.0, max_restarts=restarts))
        return servers, SleepingServers(groups[-1], calls[sleep_level], timeout_s=120.0)

    yield make
    for group in groups:
        group.close()


def state(server: Server) -> dict:
    return httpx.get(server.url, trust_env=False, timeout=60).json()


def die(server: Server) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.post(server.url + "/die", trust_env=False, timeout=60)
    wait_until(lambda: server.exit_code() is not None)


@pytest.mark.parametrize(("level", "tags"), [("all", ["kv_cache", "weights"]), ("kv_cache", ["kv_cache"])])
def test_memory_is_released_once_the_server_is_idle_and_taken_back(start, level, tags):
    servers, sleeping = start(number=2, busy=3, sleep_level=level)
    for _ in range(2):
        sleeping.release()
        assert [state(s)["released"] for s in servers] == [tags] * 2
        sleeping.resume()
        assert [state(s)["released"] for s in servers] == [[]] * 2
    assert state(servers[0])["calls"].count("/flush_cache") == 4 + 1


@pytest.mark.parametrize(("level", "tags"), [("all", ["kv_cache", "weights"]), ("kv_cache", ["kv_cache"])])
def test_vllm_sleeps_at_the_level_that_is_set_and_is_not_left_paused(start, level, tags):
    (server,), sleeping = start(program=VLLM_SERVER, calls=VLLM, sleep_level=level)
    for _ in range(2):
        sleeping.release()
        assert state(server)["released"] == tags
        sleeping.resume()
        assert state(server)["released"] == []
        assert not state(server)["paused"]


def test_a_server_that_dies_asleep_stays_down_until_the_memory_is_free_again(start):
    (server,), sleeping = start()
    before = state(server)["pid"]
    sleeping.release()
    die(server)
    assert server.starts == 1
    with pytest.raises(AssertionError):
        wait_until(server.is_healthy, 2.5)  # the watch looks every second
    sleeping.resume()
    assert server.starts == 2
    assert state(server)["pid"] != before
    assert state(server)["calls"] == []  # a new start has nothing to resume
    sleeping.release()
    sleeping.resume()


def test_a_server_that_dies_asleep_with_no_starts_left_is_named(start):
    (server,), sleeping = start(restarts=0)
    sleeping.release()
    die(server)
    with pytest.raises(
        EngineError,
        match=r"(?s)server 0 ended with exit code 7.*started again 0 times since .* \(rollout.server.max_r",
    ):
        sleeping.resume()


def test_one_that_is_dead_before_the_release_is_started_at_the_resume(start):
    servers, sleeping = start(number=2)
    sleeping._group.hold()
    die(servers[0])
    sleeping.release()
    assert state(servers[1])["released"] == ["kv_cache", "weights"]
    sleeping.resume()
    assert state(servers[0])["calls"] == []
    assert state(servers[1])["released"] == []


def test_requests_that_never_end_are_told(start, monkeypatch):
    monkeypatch.setattr(sleep, "IDLE_TIMEOUT_S", 0.5)
    _, sleeping = start(busy=10_000)
    with pytest.raises(EngineError, match=r"server 0 at http.* still has requests under way 0 s after the last answer"):
        sleeping.release()


def test_a_refusal_is_told(start):
    _, sleeping = start("refuse")
    with pytest.raises(EngineError, match=r"/release_memory_occupation .*HTTP 400: no memory saver here"):
        sleeping.release()


def test_a_server_that_dies_of_the_call_is_told(start):
    (server,), sleeping = start()
    sleeping._released[server.url] = 1  # what it never released
    sleeping._group.hold()
    with pytest.raises(EngineError, match=r"/resume_memory_occupation was not answered"):
        sleeping.resume()


@pytest.mark.parametrize("memory_saver", [False, True])
def test_only_an_engine_that_was_released_is_resumed(memory_saver):
    calls = []
    sleeping = SimpleNamespace(release=lambda: calls.append("release"), resume=lambda: calls.append("resume"))
    config = ServerConfig(memory_saver=memory_saver)
    for own in (sleeping, None):  # None: a rank whose servers another rank started
        engine = SGLangEngine(["http://127.0.0.1:9"], config, weight_version=0, sleeping=own)
        try:
            engine.resume_memory()
            assert not engine.memory_released
            engine.release_memory()
            engine.release_memory()
            assert engine.memory_released == memory_saver
            engine.resume_memory()
            engine.resume_memory()
            assert not engine.memory_released
        finally:
            engine.close()
    assert calls == (["release", "resume"] if memory_saver else [])
