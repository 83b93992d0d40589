"""A stand-in for a vLLM server with several tensor-parallel ranks, which takes weights in one of two ways.

    python vllm_peer.py ANNOUNCEMENT MODEL_DIR TP_SIZE WAY     writes its URL to the file ANNOUNCEMENT

WAY: `extension`, the methods of our worker extension over /collective_rpc; `ipc` or `nccl`, vLLM's own transfer calls
with that backend. It refuses what vLLM 0.32 refuses, with its words, and like vLLM it collects what comes for a layer,
loads the layer when as many parts as it has have come, ignores more, and forgets collected parts at the end alone. So
an update that failed half-way spoils the next one, unless it is ended first.

The slices are those of engine_peer.py. In place of a GPU's memory handles name a file in /dev/shm, and NCCL's id names
a gloo group. POST /fail {"name": ...} lets the next update with that tensor fail when it comes to it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer
from pathlib import Path

import engine_peer
import numpy as np
import torch
import torch.distributed as dist
from engine_peer import FUSED, Shard
from safetensors.numpy import load_file

PARTS = {"qkv_proj": 3, "gate_up_proj": 2}
LENGTHS = ("names", "dtype_names", "shapes", "tensor_sizes")


class Worker(Shard):
    """One tensor-parallel rank."""

    fail_at = ""  # of all ranks

    def __init__(self, config: dict, rank: int, size: int) -> None:
        super().__init__(config, rank, size)
        self.active = False  # an update is open
        self.packed = False
        self.collected: dict[str, list[tuple[str, np.ndarray]]] = {}  # engine's tensor -> what came for it
        self.received: dict[str, str] = {}  # HF name -> checksum, for the extension

    def load(self, name: str, full: np.ndarray) -> None:
        """As vLLM's reload does."""
        if name == Worker.fail_at:
            raise RuntimeError(f"CUDA error: an illegal memory access was encountered ({name})")
        layer = name.split(".")[-2]
        target = name.replace(f".{layer}.", f".{FUSED.get(layer, (layer, 0))[0]}.")
        pieces, wanted = self.collected.setdefault(target, []), PARTS.get(target.split(".")[-2], 1)
        if len(pieces) >= wanted:
            return
        pieces.append((name, full.copy()))
        if len(pieces) == wanted:
            self.parts.pop(target, None)
            for piece_name, piece in pieces:
                self.keep(piece_name, piece)

    def load_flat(self, flat: np.ndarray, metas: list) -> None:
        for name, dtype, shape, start, end in metas:
            assert dtype == "float32", dtype
            self.load(name, flat[start:end].view(np.float32).reshape(shape))

    # Our extension's methods:

    def nft_facts(self) -> dict:
        known = {"tp_size": self.size, "rank": self.rank, "dtype": "float32", "quantization": None}
        return known | {"plain": True, "device": "cpu", "hosts": 1, "gpu": ""}

    def nft_begin(self) -> bool:
        self.collected, self.received, self.active = {}, {}, True
        return True

    def nft_load_shared(self, memories: list, metas: list) -> bool:
        return self._receive(mapped(*memories[self.rank]["file"]), metas)

    def nft_join(self, address: str, port: int, name: str, rank_offset: int, world_size: int, timeout_s: float) -> bool:
        ask = {"master_address": address, "master_port": port, "group_name": name}
        self.join(ask | {"rank_offset": rank_offset, "world_size": world_size})
        return True

    def nft_load_broadcast(self, metas: list, name: str) -> bool:
        return self._receive(self.broadcast(name, metas[-1][4]), metas)

    def nft_leave(self, name: str) -> bool:
        self.groups.pop(name, None)
        return True

    def nft_load_files(self, paths: list) -> bool:
        for path in paths:
            for name, tensor in load_file(path).items():
                self._note(name, tensor)
                self.load(name, tensor)
        return True

    def nft_end(self) -> bool:
        self.collected, self.active = {}, False
        return True

    def nft_checksums(self) -> dict:
        return {"rank": self.rank, "checksums": self.received}

    def _receive(self, flat: np.ndarray, metas: list) -> bool:
        for name, _, _, start, end in metas:
            self._note(name, flat[start:end])
        self.load_flat(flat, metas)
        return True

    def _note(self, name: str, tensor: np.ndarray) -> None:
        assert name not in self.received, f"tensor {name}: came twice in one update"
        self.received[name] = hashlib.sha256(tensor.tobytes()).hexdigest()[:16]

    # vLLM's own:

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        self.packed = init_info["packed"]
        if Handler.way == "ipc":
            assert init_info.keys() == {"packed"}
            return
        packing = {"packed", "packed_buffer_size_bytes"}
        assert init_info.keys() == {"nccl_unique_id_b64", "rank_offset", "world_size", *packing}
        unique_id = base64.b64decode(init_info["nccl_unique_id_b64"], validate=True)
        assert len(unique_id) == 128
        address, port, name = unique_id.rstrip(b"\0").decode().split()
        self.groups.clear()
        self.join({"master_address": address, "master_port": int(port), "group_name": name} | init_info)
        self.groups = {"": self.groups[name]}
        self.groups[""].allreduce([torch.zeros(1)]).wait()

    def shutdown_weight_transfer_engine(self) -> None:
        if self.active:
            raise RuntimeError("Cannot release a trainer connection during a weight update")
        self.groups.clear()

    def start_weight_update(self) -> None:
        if self.active:
            raise RuntimeError("start_weight_update called while a weight update is already active.")
        self.active = True

    def update_weights(self, update_info: dict) -> None:
        if not self.active:
            raise RuntimeError("start_weight_update must be called before update_weights.")
        try:
            told = [update_info[key] for key in LENGTHS if key in update_info]
            assert len(set(map(len, told))) == 1 and self.packed
            sizes = [4 * int(np.prod(shape)) for shape in update_info["shapes"]]
            ends = np.cumsum(sizes).tolist()
            if Handler.way == "ipc":
                assert update_info["tensor_sizes"] == sizes
                handles = pickle.loads(base64.b64decode(update_info["ipc_handles_pickled"]))
                if f"GPU-{self.rank}" not in handles:
                    raise ValueError(f"IPC handle not found for GPU UUID GPU-{self.rank}. {list(handles)}")
                tensor_cls, size, stride, *_ = arguments = handles[f"GPU-{self.rank}"]
                assert (tensor_cls, tuple(size), stride, len(arguments)) == (torch.Tensor, (ends[-1],), (1,), 15)
                flat = mapped(*json.loads(arguments[7]))[: ends[-1]]
            else:
                flat = self.broadcast("", ends[-1])
            starts = [end - size for end, size in zip(ends, sizes)]
            metas = zip(update_info["names"], update_info["dtype_names"], update_info["shapes"], starts, ends)
            self.load_flat(flat, list(metas))
        except BaseException:
            self.active = False
            raise

    def finish_weight_update(self) -> None:
        if not self.active:
            raise RuntimeError("finish_weight_update called without a matching start_weight_update.")
        self.collected, self.active = {}, False

    def update_config(self, overrides: dict) -> None:
        assert overrides == {"load_config": {"load_format": "safetensors"}}

    def reload_weights(self, weights_path: str) -> None:
        assert not self.active
        for path in sorted(Path(weights_path).glob("*.safetensors")):
            for name, tensor in load_file(path).items():
                self.load(name, tensor)
        self.collected = {}

    def broadcast(self, group: str, nbytes: int) -> np.ndarray:
        flat = torch.empty(nbytes, dtype=torch.uint8)
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self.groups[group].broadcast([flat], options).wait()
        return flat.numpy()

    def digests(self) -> dict[str, str]:
        return {name: hashlib.sha256(tensor.tobytes()).hexdigest() for name, tensor in self.tensors().items()}


def mapped(manager: str, handle: str, nbytes: int) -> np.ndarray:
    """uint8 [nbytes] of the trainer's memory."""
    storage = torch.UntypedStorage._new_shared_filename_cpu(manager.encode(), handle.encode(), nbytes)
    return torch.empty(0, dtype=torch.uint8).set_(storage._shared_decref()).numpy()


class Handler(engine_peer.Handler):
    way: str
    version = "-1"

    def do_GET(self) -> None:
        self.note()
        config = {
            "parallel_config": {
                "tensor_parallel_size": len(self.shards),
                "pipeline_parallel_size": 1,
                "data_parallel_size": 1,
            },
            "model_config": {"dtype": "torch.float32", "quantization": None},
            "device_config": {"device": "cpu"},
            "weight_transfer_config": None if self.way == "extension" else {"backend": self.way},
        }
        known = {"/server_info?config_format=json": {"vllm_config": config}}
        known["/weight_info"] = {"weight_version": Handler.version}
        known["/seen"] = {"calls": self.calls, "tensors": [shard.checksums() for shard in self.shards]}
        self.answer(200 if self.path in known else 404, known.get(self.path, {}))

    def do_POST(self) -> None:
        ask = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        self.note()
        try:
            self.answer(200, self.answer_to(self.path.removeprefix("/"), ask))
        except Exception as error:
            self.answer(500, {"error": {"message": f"{type(error).__name__}: {error}", "code": 500}})

    def answer_to(self, path: str, ask: dict) -> dict:
        own = ("init_weight_transfer_engine", "shutdown_weight_transfer_engine")
        own += ("start_weight_update", "update_weights", "finish_weight_update")
        if path == "fail":
            Worker.fail_at = ask["name"]
        elif path == "collective_rpc":
            return {"results": self.on_workers(ask["method"], *ask["args"], **ask["kwargs"])}
        elif path in own:
            if self.way == "extension":
                raise RuntimeError("Weight transfer not configured. Please set weight_transfer_config to enable it.")
            self.on_workers(path, **ask)
        elif path == "weight_checker":
            assert ask == {"action": "checksum"}
            found = {f"dp0:pp0:pcp0:tp{s.rank}:{n}": v for s in self.shards for n, v in s.digests().items()}
            return {"checksums": found}
        elif path == "update_weight_version":
            Handler.version = ask["new_version"]
        elif path == "inference/v1/generate":  # every token of a question has the log-prob -1
            return {"prompt_logprobs": [None, *({str(t): {"logprob": -1.0}} for t in ask["token_ids"][1:])]}
        else:
            assert path in ("pause?mode=wait", "resume", "reset_prefix_cache?reset_running_requests=true"), path
        return {"success": True}

    def on_workers(self, method: str, *arguments: object, **named: object) -> list:
        if method.startswith("nft_") and self.way != "extension":
            raise AttributeError(f"'Worker' object has no attribute '{method}'")
        calls = [self.threads.submit(getattr(shard, method), *arguments, **named) for shard in self.shards]
        try:
            return [call.result() for call in calls]
        finally:
            if any(call.exception() for call in calls):
                Worker.fail_at = ""


def main() -> None:
    announcement, model, size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    config = json.loads((model / "config.json").read_text())
    Handler.shards = [Worker(config, rank, size) for rank in range(size)]
    Handler.threads, Handler.calls, Handler.way = ThreadPoolExecutor(size), [], sys.argv[4]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    partial = announcement.with_suffix(".partial")
    partial.write_text(f"{os.getpid()} http://127.0.0.1:{server.server_port}")
    partial.rename(announcement)
    server.serve_forever()


if __name__ == "__main__":
    main()
