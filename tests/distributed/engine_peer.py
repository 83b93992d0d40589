"""A stand-in for an SGLang server with several tensor-parallel ranks, which SGLang itself does not run on a CPU.

    python engine_peer.py ANNOUNCEMENT MODEL_DIR TP_SIZE [ADDRESS [PORT]]     writes its URL to the file ANNOUNCEMENT

It answers SGLang's update calls over HTTP. Each of its ranks is a thread that joins the trainer's gloo group under a
rank of its own, or reads the shared memory or the files that it is told, and keeps the part of each tensor that
SGLang's rank would, in a buffer laid out as SGLang's. The slicing is written here from SGLang's layers (heads,
columns, rows, padded vocabulary), with numpy on the buffers, and shares no code with the trainer. GET /seen tells who
called what, and of each rank which processes' memory it read.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import os
import pickle
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.numpy import load_file

TIMEOUT = datetime.timedelta(seconds=120)  # an answer comes before the trainer gives up
FUSED = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2)}
FUSED |= {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}


class Shard:
    """The weights and the group of one tensor-parallel rank."""

    def __init__(self, config: dict, rank: int, size: int) -> None:
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.rank, self.size = rank, size
        self.groups: dict[str, dist.ProcessGroupGloo] = {}  # of each leader
        self.read_from: set[int] = set()  # process ids
        self.parts: dict[str, dict[int, np.ndarray]] = {}  # engine's tensor -> place in it -> rows

    def join(self, ask: dict) -> None:
        store = dist.TCPStore(ask["master_address"], ask["master_port"], None, is_master=False, timeout=TIMEOUT)
        store = dist.PrefixStore(f"{ask['group_name']}/", dist.PrefixStore(ask["group_name"], store))
        rank = ask["rank_offset"] + self.rank
        group = dist.ProcessGroupGloo(dist.PrefixStore("cpu/", store), rank, ask["world_size"], TIMEOUT)
        self.groups[ask["group_name"]] = group

    def leave(self, ask: dict) -> None:
        self.groups.pop(ask["group_name"], None)

    def receive(self, ask: dict) -> None:
        sizes = [4 * int(np.prod(shape)) for shape in ask["shapes"]]
        assert set(ask["dtypes"]) == {"float32"} and ask["load_format"] == "flattened_bucket"
        flat = torch.empty(sum(sizes), dtype=torch.uint8)
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self.groups[ask["group_name"]].broadcast([flat], options).wait()
        offset = 0
        for name, shape, size in zip(ask["names"], ask["shapes"], sizes, strict=True):
            self.keep(name, flat.numpy()[offset : offset + size].view(np.float32).reshape(shape))
            offset += size

    def read(self, ask: dict) -> None:
        assert len(ask["serialized_named_tensors"]) == self.size and ask["load_format"] == "flattened_bucket"
        message = base64.b64decode(ask["serialized_named_tensors"][self.rank])
        self.read_from.add(int(re.search(rb"/torch_(\d+)_", message)[1]))
        found = pickle.loads(message)
        for meta in found["metadata"]:
            part = found["flattened_tensor"].numpy()[meta.start_idx : meta.end_idx]
            self.keep(meta.name, part.view(np.float32).reshape(meta.shape))

    def load(self, ask: dict) -> None:
        for path in Path(ask["model_path"]).glob("*.safetensors"):
            for name, tensor in load_file(path).items():
                self.keep(name, tensor)

    def keep(self, name: str, full: np.ndarray) -> None:
        layer = name.split(".")[-2]
        target, place = FUSED.get(layer, (layer, 0))
        self.parts.setdefault(name.replace(f".{layer}.", f".{target}."), {})[place] = self.own(layer, full).copy()

    def own(self, layer: str, full: np.ndarray) -> np.ndarray:
        if layer in ("embed_tokens", "lm_head"):
            rows = -(-len(full) // 64) * 64
            full = np.concatenate([full, np.zeros((rows - len(full), full.shape[1]), full.dtype)])
            return np.split(full, self.size)[self.rank]
        if layer == "q_proj":
            return full.reshape(self.heads, -1)[self._mine(self.heads)].reshape(-1, *full.shape[1:])
        if layer in ("k_proj", "v_proj"):  # more ranks than heads: neighbours keep the same one
            heads = (
                self._mine(self.kv_heads) if self.kv_heads >= self.size else [self.rank * self.kv_heads // self.size]
            )
            return full.reshape(self.kv_heads, -1)[heads].reshape(-1, *full.shape[1:])
        if layer in ("gate_proj", "up_proj"):
            return np.split(full, self.size)[self.rank]
        if layer in ("o_proj", "down_proj"):
            return np.split(full, self.size, axis=1)[self.rank]
        assert "norm" in layer, layer
        return full

    def _mine(self, heads: int) -> list[int]:
        return list(range(self.rank * heads // self.size, (self.rank + 1) * heads // self.size))

    def tensors(self) -> dict[str, np.ndarray]:
        return {n: np.concatenate([parts[i] for i in sorted(parts)]) for n, parts in self.parts.items()}

    def checksums(self) -> dict[str, str]:
        return {n: hashlib.sha256(t.tobytes()).hexdigest()[:16] for n, t in self.tensors().items()}


class Handler(BaseHTTPRequestHandler):
    shards: list[Shard]
    threads: ThreadPoolExecutor
    calls: list[tuple[str, str]]  # (address of the caller, path)
    version = "-1"  # as SGLang's, started by a run
    refused: tuple[str, ...] = ()
    num_nodes = 1

    def do_GET(self) -> None:
        known = {"/server_info": {"tp_size": len(self.shards), "dtype": "float32", "nnodes": self.num_nodes}}
        known["/model_info"] = {"weight_version": self.version}
        known["/seen"] = {"calls": self.calls, "read_from": [sorted(shard.read_from) for shard in self.shards]}
        known["/seen"]["groups"] = [len(shard.groups) for shard in self.shards]
        self.note()
        self.answer(200 if self.path in known else 405, known.get(self.path, {}))

    def do_POST(self) -> None:
        ask = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        self.note()
        if self.path == "/from_now_on":  # of tests
            Handler.refused, Handler.num_nodes = tuple(ask.get("refused", ())), ask.get("num_nodes", 1)
        if self.path in self.refused:
            self.answer(400, {"success": False, "message": "refused by the test"})
            return
        calls = {"/init_weights_update_group": Shard.join, "/update_weights_from_distributed": Shard.receive}
        calls["/update_weights_from_tensor"] = Shard.read
        calls["/update_weights_from_disk"] = Shard.load
        calls["/destroy_weights_update_group"] = Shard.leave
        if self.path == "/update_weight_version":
            Handler.version = ask["new_version"]
        try:
            if self.path in calls:
                list(self.threads.map(lambda shard: calls[self.path](shard, ask), self.shards))
        except RuntimeError as error:
            self.answer(400, {"success": False, "message": str(error)})
            return
        if self.path == "/generate":  # every token of a question has the log-prob -1
            logprobs = [[None if i == 0 else -1.0, token, None] for i, token in enumerate(ask["input_ids"])]
            self.answer(200, {"meta_info": {"input_token_logprobs": logprobs}})
            return
        found = [{"parallelism_info": {"tp_rank": s.rank}, "checksums": s.checksums()} for s in self.shards]
        self.answer(200, {"success": True} | ({"ranks": found} if self.path == "/weights_checker" else {}))

    def note(self) -> None:
        self.calls.append((self.client_address[0], self.path))

    def answer(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    announcement, model, size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    config = json.loads((model / "config.json").read_text())
    Handler.shards = [Shard(config, rank, size) for rank in range(size)]
    Handler.threads, Handler.calls = ThreadPoolExecutor(size), []
    address = sys.argv[4] if len(sys.argv) > 4 else "127.0.0.1"
    port = int(sys.argv[5]) if len(sys.argv) > 5 else 0
    server = ThreadingHTTPServer((address, port), Handler)
    partial = announcement.with_suffix(".partial")
    partial.write_text(f"{os.getpid()} http://{address}:{server.server_port}")
    partial.rename(announcement)
    server.serve_forever()


if __name__ == "__main__":
    main()
