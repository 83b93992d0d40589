"""Engines of several ranks: who starts servers, who asks them, and who learns of a failure."""

import json
import os
import shlex
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from launch import Ranks, run_checks
from processes import below
from tiny import make_model

from megatron_nft.config import RolloutConfig
from megatron_nft.engines.engine import EngineError, Request, SamplingParams
from megatron_nft.engines.open import open_engine

# A stand-in for the engine's interpreter: it takes SGLang's command line and answers each token with its own id.
SERVER = """
    import http.server, json, sys
    arguments = dict(a.removeprefix("--").split("=", 1) for a in sys.argv if "=" in a)
    if arguments["model-path"].endswith("broken"):
        sys.exit("cannot load this model")
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer({})
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            ids = [body["input_ids"][0]]
            meta = {"finish_reason": {"type": "stop"}, "weight_version": arguments["weight-version"]}
            meta["output_token_logprobs"] = [[-1.0, ids[0], None]]
            self.answer({"output_ids": ids, "meta_info": meta})
        def answer(self, value):
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        def log_message(self, *args):
            pass
    http.server.ThreadingHTTPServer((arguments["host"], int(arguments["port"])), Handler).serve_forever()
"""


def layout(ranks: Ranks) -> SimpleNamespace:
    return SimpleNamespace(
        rank=ranks.rank, world_size=ranks.world_size, device=torch.device("cpu"), world_gloo=dist.group.WORLD
    )


def everyone(value) -> list:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def server_settings(ranks: Ranks) -> RolloutConfig:
    path = ranks.scratch / "server"
    if ranks.rank == 0:
        program = ranks.scratch / "server.py"
        program.write_text(textwrap.dedent(SERVER))
        path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(program))} "$@"\n')
        path.chmod(0o755)
    dist.barrier()
    return RolloutConfig(engine="sglang", server={"python": path, "num_servers": 2, "start_timeout_s": 100})


def check_first_rank_starts_the_servers_that_all_ask(ranks: Ranks) -> None:
    settings = server_settings(ranks)
    before = below(os.getpid())
    engine = open_engine(Path("model"), settings, precision="fp32", log_dir=ranks.scratch / "a", layout=layout(ranks))
    try:
        assert (engine.group is not None) == (ranks.rank == 0)
        assert len(engine.urls) == 2
        assert everyone((engine.urls, engine.all_urls)) == [(engine.urls, engine.urls)] * 2
        requests = [Request(np.array([100 * ranks.rank + i], dtype=np.int32), 1, (0,)) for i in range(10)]
        answers = {i: c.token_ids.tolist() for i, _, c in engine.generate(requests, SamplingParams(4))}
        assert answers == {i: [100 * ranks.rank + i] for i in range(10)}
        dist.barrier()
    finally:
        engine.close()
    assert below(os.getpid()) == before


def check_no_answers_before_the_first_weights(ranks: Ranks) -> None:
    settings = server_settings(ranks)
    options = {"precision": "fp32", "log_dir": ranks.scratch / "b", "layout": layout(ranks), "load_weights": False}
    engine = open_engine(Path("model"), settings, **options)
    try:
        assert engine.weight_version == -1
        engine.weight_version = 0  # as if a sync had run that did not reach the servers
        request = Request(np.array([1], dtype=np.int32), 1, (0,))
        try:
            next(engine.generate([request], SamplingParams(4)))
            raise AssertionError("an answer came")
        except EngineError as e:
            assert "answered under weight version -1, asked was 0" in str(e)
        dist.barrier()
    finally:
        engine.close()


def check_a_server_that_does_not_come_up_is_an_error_on_every_rank(ranks: Ranks) -> None:
    settings = server_settings(ranks)
    before = below(os.getpid())
    try:
        open_engine(Path("broken"), settings, precision="fp32", log_dir=ranks.scratch / "c", layout=layout(ranks))
        error = ""
    except EngineError as e:
        error = str(e)
    for text in everyone(error):
        assert "ended with exit code 1" in text
        assert "cannot load this model" in text
    assert below(os.getpid()) == before


def check_embedded_engines_draw_the_same_on_every_rank(ranks: Ranks) -> None:
    model = ranks.scratch / "tiny"
    if ranks.rank == 0:
        make_model(model)
    dist.barrier()
    engine = open_engine(
        model, RolloutConfig(), precision="fp32", log_dir=ranks.scratch, layout=layout(ranks), load_weights=True
    )
    request = Request(np.arange(40, 46, dtype=np.int32), 4, (7, 3))
    answers = sorted((k, c.token_ids.tolist()) for _, k, c in engine.generate([request], SamplingParams(12)))
    first, second = everyone(json.dumps(answers))
    assert first == second
    engine.close()


if __name__ == "__main__":
    run_checks(globals())
