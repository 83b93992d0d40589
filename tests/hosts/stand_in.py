"""A stand-in for SGLang and for its router: it takes their command lines and answers each token with its own id.

    python stand_in.py -m sglang.launch_server --host=… --port=… [--record=FOLDER]

With --record it writes its environment to FOLDER/server.json or FOLDER/router.json before it answers. GET tells which
host it is on; so does the log-prob of an answer, which is -2 on the host h2. POST /set_version {"version": N} stands
for a weight sync. With a key in its environment it answers 401 to whoever does not send it, but at /health.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def interpreter(folder: Path) -> Path:
    """An executable for rollout.server.python."""
    path = folder / "stand-in"
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(__file__)} "$@"\n')
    path.chmod(0o755)
    return path


class Handler(BaseHTTPRequestHandler):
    version: str

    def do_GET(self) -> None:
        if self.may_pass():
            self.answer({"host": os.uname().nodename, "weight_version": self.version})

    def do_POST(self) -> None:
        if not self.may_pass():
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/set_version":
            Handler.version = str(body["version"])
            self.answer({})
            return
        ids = [body["input_ids"][0]]
        meta = {"finish_reason": {"type": "stop"}, "weight_version": self.version}
        meta["output_token_logprobs"] = [[-float(re.search(r"\d*$", os.uname().nodename).group() or 1), ids[0], None]]
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


def main() -> None:
    if sys.argv[1] == "-c":  # whether a package is there
        return
    arguments = dict(a.removeprefix("--").split("=", 1) for a in sys.argv if "=" in a)
    if "record" in arguments:
        name = "router" if any("router" in a for a in sys.argv[:3]) else "server"
        Path(arguments["record"], f"{name}.json").write_text(json.dumps(dict(os.environ)))
    Handler.version = arguments.get("weight-version", "0")
    ThreadingHTTPServer((arguments["host"], int(arguments["port"])), Handler).serve_forever()


if __name__ == "__main__":
    main()
