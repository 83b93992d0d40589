"""A stand-in for SGLang and for its router: it takes their command lines and answers each token with its own id.

    python stand_in.py -m sglang.launch_server --host=… --port=… [--record=FOLDER]

With --record it writes its environment to FOLDER/server.json or FOLDER/router.json before it answers. GET tells which
host it is on, and how many answers it gave; the log-prob of an answer is -2 on the host h2. POST /set_version
{"version": N} stands for a weight sync, /die ends it and /hang stops it. With a key in its environment it answers 401
to whoever does not send it, but at /health.

The router takes workers as sglang-router does, gives each request to the next one, and to another where it breaks off.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import signal
import sys
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.error import URLError


def interpreter(folder: Path) -> Path:
    """An executable for rollout.server.python."""
    path = folder / "stand-in"
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(__file__)} "$@"\n')
    path.chmod(0o755)
    return path


class Handler(BaseHTTPRequestHandler):
    version: str
    answers = itertools.count()
    num_answers = 0

    def do_GET(self) -> None:
        if self.may_pass():
            told = {"weight_version": self.version, "answers": self.num_answers}
            self.answer({"host": os.uname().nodename, **told})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.may_pass():
            self.act(json.loads(body))

    def act(self, body: dict) -> None:
        if self.path == "/die":
            os._exit(7)
        if self.path == "/hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.path == "/set_version":
            Handler.version = str(body["version"])
            self.answer({})
            return
        ids = [body["input_ids"][0]]
        meta = {"finish_reason": {"type": "stop"}, "weight_version": self.version}
        meta["output_token_logprobs"] = [[-float(re.search(r"\d*$", os.uname().nodename).group() or 1), ids[0], None]]
        Handler.num_answers = next(self.answers) + 1
        self.answer({"output_ids": ids, "meta_info": meta})

    def may_pass(self) -> bool:
        key = os.environ.get("NFT_SERVER_KEY")
        if key and self.path != "/health" and self.headers["Authorization"] != f"Bearer {key}":
            self.answer({}, 401)
            return False
        return True

    def answer(self, value: dict, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class RouterHandler(Handler):
    workers: ClassVar[dict[str, str]] = {}  # URL -> id
    turn = itertools.count()

    def do_GET(self) -> None:
        if self.may_pass():
            known = [{"url": url, "id": known, "is_healthy": True} for url, known in self.workers.items()]
            self.answer({"workers": known})

    def do_DELETE(self) -> None:
        if self.may_pass():
            for url in [url for url, known in self.workers.items() if self.path == f"/workers/{known}"]:
                self.workers.pop(url)
            self.answer({})

    def act(self, body: dict) -> None:
        if self.path == "/workers":
            self.workers[body["url"]] = str(next(self.turn))
            self.answer({})
            return
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        headers = {"Authorization": self.headers["Authorization"] or "", "Content-Type": "application/json"}
        for _ in range(20):
            if not (urls := list(self.workers)):
                break
            url = urls[next(self.turn) % len(urls)]
            asked = urllib.request.Request(f"{url}{self.path}", json.dumps(body).encode(), headers)
            try:
                self.answer(json.load(opener.open(asked)))
                return
            except (URLError, OSError, ValueError):  # it died
                continue
        self.answer({"error": "no worker answers"}, 503)


class StandIn(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024


def main() -> None:
    if sys.argv[1] == "-c":  # whether a package is there
        return
    arguments = dict(a.removeprefix("--").split("=", 1) for a in sys.argv if "=" in a)
    is_router = any("router" in a for a in sys.argv[:3])
    if "record" in arguments:
        name = "router" if is_router else "server"
        Path(arguments["record"], f"{name}.json").write_text(json.dumps(dict(os.environ)))
    Handler.version = arguments.get("weight-version", "0")
    handler = RouterHandler if is_router else Handler
    StandIn((arguments["host"], int(arguments["port"])), handler).serve_forever()


if __name__ == "__main__":
    main()
