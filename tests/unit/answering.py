"""Local servers that answer as SGLang does, or badly, and clients that ask them."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from megatron_nft.config import ServerConfig
from megatron_nft.engines.engine import Request, SamplingParams
from megatron_nft.engines.sglang.client import SGLangEngine


def sample(tokens=(5, 6), version="3", reason="stop", **meta):
    logprobs = [[-0.5, t, None] for t in tokens]
    return {
        "output_ids": list(tokens),
        "meta_info": {
            "finish_reason": {"type": reason},
            "weight_version": version,
            "output_token_logprobs": logprobs,
            **meta,
        },
    }


def good(body):
    return 200, sample()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024


@contextmanager
def serving(answer, version="3"):
    """A server whose POST /generate gives `answer(body)` -> (status, JSON); None closes the connection."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            server.looks.append(self.path)
            moves = self.path != "/health_generate" or server.moves()
            self._send(200 if moves else 503, {"weight_version": server.version})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.bodies.append(body)
            result = server.answer(body)
            if result is None:
                self.close_connection = True
            else:
                self._send(*result)

        def _send(self, status, value):
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = Server(("127.0.0.1", 0), Handler)
    server.answer, server.version, server.bodies = answer, version, []
    server.looks, server.moves = [], lambda: True
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def engine(*servers, version=3, options=None, allow_version_change=False, first=0, **settings):
    """options: of the client. settings: of rollout.server."""
    urls = [s if isinstance(s, str) else s.url for s in servers]
    client = SGLangEngine(
        urls,
        ServerConfig(**settings),
        weight_version=version,
        allow_version_change=allow_version_change,
        first=first,
        **options or {},
    )
    try:
        yield client
    finally:
        client.close()


def requests(count, samples=2):
    return [Request(np.array([1, 2, i], dtype=np.int32), samples, (0, i)) for i in range(count)]


def run(client, reqs, sampling=None):
    return {(i, k): c for i, k, c in client.generate(reqs, sampling or SamplingParams(8))}


def failing_first(times, failure):
    left = [times]

    def answer(body):
        left[0] -= 1
        return failure if left[0] >= 0 else good(body)

    return answer
