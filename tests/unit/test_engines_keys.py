"""The key of a run: who has it, who does not, and what a server says to those who do not send it."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from pydantic import ValidationError

from megatron_nft.config import RolloutConfig, ServerConfig
from megatron_nft.engines import addresses, keys
from megatron_nft.engines.engine import EngineError
from megatron_nft.engines.guard import nft_guard
from megatron_nft.engines.server import Server
from megatron_nft.engines.sglang import command as sglang
from megatron_nft.engines.sglang.router import router_command
from megatron_nft.engines.vllm import command as vllm

KEY = "0123456789abcdef"


def ask(path: str, sent: list[tuple[bytes, bytes]], kind: str = "http") -> list[dict]:
    """What a guarded ASGI application, which answers everything with 200, sends for one request."""
    messages: list[dict] = []

    async def application(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 200})

    async def send(message):
        messages.append(message)

    scope = {"type": kind, "path": path, "method": "POST", "headers": sent}
    asyncio.run(nft_guard.KeyCheck(application)(scope, None, send))
    return messages


@pytest.fixture
def with_key(monkeypatch):
    monkeypatch.setattr(nft_guard, "KEY", KEY)


@pytest.mark.parametrize(
    "sent",
    [
        [],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"Bearer 0123456789abcdee")],
        [(b"authorization", b"bearer 0123456789abcdef0")],
        [(b"authorization", b"Basic 0123456789abcdef")],
        [(b"authorization", b"Bearer wrong"), (b"authorization", b"Bearer 0123456789abcdef")],
        [(b"x-api-key", b"0123456789abcdef")],
    ],
)
@pytest.mark.parametrize(
    "path", ["/pause_generation", "/health_generate", "/healthy", "//health", "/health/", "/nothing"]
)
def test_nobody_passes_without_the_key(with_key, path, sent):
    assert ask(path, sent)[0]["status"] == 401


def test_who_passes(with_key):
    assert ask("/pause_generation", [(b"Authorization", b"Bearer 0123456789abcdef")])[0]["status"] == 200
    twice = [(b"authorization", b"Bearer 0123456789abcdef")] * 2
    assert ask("/generate", twice)[0]["status"] == 200
    assert ask("/health", [])[0]["status"] == 200
    assert ask("/ws", [], "websocket") == [{"type": "websocket.close", "code": 1008}]


def test_a_server_without_a_key_does_not_start(monkeypatch):
    monkeypatch.setattr(nft_guard, "KEY", "")
    with pytest.raises(RuntimeError, match="open to everyone"):
        nft_guard.KeyCheck(None)


def test_the_key_is_kept_out_of_logs(with_key, caplog):
    before = logging.getLogRecordFactory()
    try:
        nft_guard.keep_key_out_of_logs()
        logging.getLogger("engine").warning("server_args=%s and %d", {"api_key": KEY}, 3)
        logging.getLogger("engine").warning("nothing to hide: %s", "a")
    finally:
        logging.setLogRecordFactory(before)
    assert [r.getMessage() for r in caplog.records] == ["server_args={'api_key': '***'} and 3", "nothing to hide: a"]


def test_the_key_is_in_no_command_line(tmp_path):
    common = {"device": "cpu", "dtype": "float32", "gpu": 0, "weight_version": 0}
    for kind in sglang, vllm:
        plain = kind.command_line(Path("/e/python"), Path("/m"), ServerConfig(host="10.0.0.1"), **common)
        assert "guard" not in " ".join(plain)
        server = Server(
            "s", kind.guarded(plain), host="127.0.0.1", environment={"A": "1"}, log_path=tmp_path / "log", key=KEY
        )
        assert "guard" in " ".join(server._command) and KEY not in " ".join(server._command)
        assert server._environment == {"A": "1", "NFT_SERVER_KEY": KEY}
        assert server.headers == {"Authorization": f"Bearer {KEY}"}
        assert [a for a in plain if a not in server._command] in ([], ["-m", "sglang.launch_server"])
    folder = str(keys.FOLDER)
    assert folder in vllm.environment(ServerConfig(), device="cpu", gpu=0)["PYTHONPATH"].split(os.pathsep)
    assert (keys.FOLDER / "nft_sglang_server.py").is_file() and (keys.FOLDER / "nft_sglang_router.py").is_file()


def test_the_routers_command(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    assert router_command(python, ServerConfig(), guarded=False)[1:3] == ["-m", "sglang_router.launch_router"]
    assert router_command(python, ServerConfig(), guarded=True)[1] == str(keys.FOLDER / "nft_sglang_router.py")


def test_only_the_owner_reads_the_file(tmp_path):
    path = tmp_path / "engines" / "key"
    first, second = keys.new_key(), keys.new_key()
    assert len(first) == 64 and first != second
    for key in first, second:
        keys.write_key(path, key)
        assert keys.read_key(path) == key
        assert path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]
    path.write_text("\n")
    with pytest.raises(EngineError, match="holds no key"):
        keys.read_key(path)
    with pytest.raises(EngineError, match=r"cannot be read from .*none"):
        keys.read_key(tmp_path / "none")


def _common(path, ready, found):
    ready.wait()
    found.put(keys.common_key(path))


def test_nodes_that_start_together_share_one_key(tmp_path):
    path, context = tmp_path / "registry" / "key", multiprocessing.get_context("fork")
    ready, found = context.Barrier(6), context.Queue()
    processes = [context.Process(target=_common, args=(path, ready, found)) for _ in range(6)]
    for process in processes:
        process.start()
    made = {found.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert made == {keys.common_key(path)}
    assert path.stat().st_mode & 0o777 == 0o600 and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("status", [200, 404, 401])
def test_a_server_that_stays_open_is_noticed(status):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    if status == 401:
        keys.check_closed(url)
    else:
        with pytest.raises(EngineError, match=rf"answers requests without the key of the run \(HTTP {status}"):
            keys.check_closed(url)
    server.shutdown()
    server.server_close()
    with pytest.raises(EngineError, match="does not answer"):
        keys.check_closed(url)


def test_the_router_and_sleeping_engines():
    """Allowed only where SGLang's /health, which the router asks, makes no token."""
    both = {"router": True, "memory_saver": True}
    server = RolloutConfig(engine="sglang", server=both).server
    given = sglang.environment(server, device="cuda", gpu=0)
    assert given["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] == "false"
    assert "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION" not in sglang.environment(ServerConfig(), device="cuda", gpu=0)
    for wrong in (
        {"env": {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "1"}},
        {"router_args": ["--health-check-endpoint=/health_generate"]},
    ):
        with pytest.raises(ValidationError, match="sleeping engine"):
            RolloutConfig(engine="sglang", server=both | wrong)
        RolloutConfig(engine="sglang", server={"router": True} | wrong)


def test_the_address_of_an_engine_node(monkeypatch):
    """An IP address is taken; a name is not looked up, since it may stand for loopback on the node itself."""
    monkeypatch.setattr(addresses, "_towards", lambda host: {"trainer": "10.0.0.9", "": ""}.get(host, ""))
    for name in ("NFT_ADDRESS", "NFT_MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert addresses.node_address() == ""
    monkeypatch.setenv("NFT_ADDRESS", "10.0.0.5")
    assert addresses.node_address() == "10.0.0.5"
    monkeypatch.setenv("NFT_ADDRESS", "node5")
    with pytest.raises(EngineError, match=r"NFT_ADDRESS='node5'.*set NFT_IFNAME"):
        addresses.node_address()
    monkeypatch.setenv("NFT_MASTER_ADDR", "trainer")
    assert addresses.node_address() == "10.0.0.9"
