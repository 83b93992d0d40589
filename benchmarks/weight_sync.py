"""Live weight sync: bytes, seconds and GB/s for each transport and layout, next to a plain copy of the same bytes.

    python benchmarks/weight_sync.py [--megabytes 512] [--layouts 1x1 2x1 1x2] [--engine sglang|vllm|none]

Makes a random dense model of that size, starts one engine server on this machine, and for each TPxPP layout starts
the ranks that sync into it: shared memory (CUDA IPC on a GPU), a gloo or NCCL group, and `disk`, which saves
safetensors that the engine then loads again. `in-process` is the embedded engine's copy. `moved` is a sync without the
comparison of checksums, `checked` one with it; both are whole, from pausing the engine to its first answer. On a GPU
the copy is one within device memory, and every rank needs a GPU of its own beside the server's.
Writes benchmarks/results/weight_sync.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "weight_sync.md"
SYNCS = 5  # after one that touches the buffers and forms the groups
HIDDEN, VOCAB = 512, 1024  # 8 heads, 2 key/value heads: TP 2 divides them
LAYER_ELEMENTS = 11.5 * HIDDEN**2  # q and o, k and v of a quarter, three MLP matrices of 3 x hidden


def make_model(folder: Path, megabytes: int, dtype: str) -> int:
    """A Qwen2 folder with random weights; its bytes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_nft.data.synthetic import make_tokenizer

    itemsize = getattr(torch, dtype).itemsize
    layers = max(2, 2 * round(megabytes * 1e6 / itemsize / LAYER_ELEMENTS / 2))
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=HIDDEN // 64,
        num_key_value_heads=HIDDEN // 256,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return sum(p.nbytes for p in model.parameters())


# --- one rank ---------------------------------------------------------------------------------------------------------


def run_rank(plan: dict) -> None:
    """Measure every transport in this rank's layout; rank 0 adds a row each to plan["rows"]."""
    import torch

    from megatron_nft.policy import parallel
    from megatron_nft.policy.family import read_family
    from megatron_nft.policy.model import build_chunks
    from megatron_nft.weights.import_hf import load_hf

    config = config_of(plan, "embedded", "auto", True)
    layout = parallel.initialize(config.policy, seed=0)
    torch.set_num_threads(1)
    spec = read_family(config.model.path)
    chunks = build_chunks(spec, config.policy, layout)
    load_hf(chunks, config.model.path, spec, layout)
    version = 0
    for name in plan["transports"]:
        row = {"layout": plan["layout"], "transport": name}
        for kind in ("checked", "moved"):
            engine_kind = "embedded" if name == "in-process" else plan["engine"]
            config = config_of(plan, engine_kind, "auto" if name == "in-process" else name, kind == "checked")
            receipts, walls = measure(config, spec, layout, chunks, version)
            version += SYNCS + 1
            middle = sorted(range(SYNCS), key=walls.__getitem__)[SYNCS // 2]
            row |= {"nbytes": receipts[0].nbytes, kind: walls[middle], f"{kind} phases": receipts[middle].seconds}
        if layout.rank == 0:
            with open(plan["rows"], "a") as rows:
                rows.write(json.dumps(row) + "\n")
    parallel.shutdown()


def config_of(plan: dict, engine: str, transport: str, verify: bool):
    from megatron_nft.config import Config

    tp, pp = map(int, plan["layout"].split("x"))
    return Config.model_validate(
        {
            "run_dir": plan["run_dir"],
            "model": {"path": plan["model"]},
            "data": {"train": ["unused"]},
            "policy": {
                "precision": plan["precision"],
                "tensor_model_parallel_size": tp,
                "pipeline_model_parallel_size": pp,
            },
            "rollout": {"engine": engine, "server": {"urls": [] if engine == "embedded" else plan["urls"]}},
            "sync": {"transport": transport, "bucket_bytes": plan["bucket_bytes"], "verify_checksums": verify},
        }
    )


def measure(config, spec, layout, chunks, version: int):
    """(receipts, seconds) of SYNCS syncs."""
    import torch.distributed as dist

    from megatron_nft.engines.open import create_engine
    from megatron_nft.engines.sync import open_weight_sync

    engine = create_engine(config, layout)
    sync = open_weight_sync(config, spec, layout, engine)
    receipts, walls = [], []
    for i in range(SYNCS + 1):
        dist.barrier(group=layout.world_gloo)
        start = time.perf_counter()
        receipts.append(sync.sync(chunks, version + 1 + i))
        walls.append(time.perf_counter() - start)
    sync.close()
    engine.close()
    return receipts[1:], walls[1:]


# --- the whole --------------------------------------------------------------------------------------------------------


def copy_seconds(nbytes: int) -> float:
    """One thread's copy of `nbytes` into memory that was touched before; median of 5."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
    target, seconds = source.clone(), []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure_all(args: argparse.Namespace, scratch: Path) -> tuple[list[dict], int, float]:
    import torch

    from megatron_nft.config import RolloutConfig
    from megatron_nft.engines.open import engine_kind
    from megatron_nft.engines.start import start_servers
    from megatron_nft.train.launch import start_local

    on_gpu = torch.cuda.is_available()
    precision = "bf16" if on_gpu else "fp32"
    nbytes = make_model(scratch / "model", args.megabytes, "bfloat16" if on_gpu else "float32")
    plan = {
        "model": str(scratch / "model"),
        "run_dir": str(scratch / "run"),
        "rows": str(scratch / "rows.jsonl"),
        "engine": args.engine,
        "precision": precision,
        "bucket_bytes": args.bucket_megabytes << 20,
        "transports": ["in-process"] + ["tensor", "distributed", "disk"] * (args.engine != "none"),
    }
    group = None
    if args.engine != "none":
        group = start_servers(
            engine_kind(args.engine),
            scratch / "model",
            RolloutConfig(engine=args.engine, server={"start_timeout_s": args.start_timeout}),
            precision=precision,
            device="cuda" if on_gpu else "cpu",
            log_dir=scratch / "logs",
            weight_version=0,
        )
    try:
        for layout in args.layouts:
            tp, pp = map(int, layout.split("x"))
            told = plan | {"layout": layout, "urls": group.urls if group else []}
            command = [sys.executable, __file__, "--rank-plan", json.dumps(told)]
            if start_local(command, tp * pp) != 0:
                raise SystemExit(f"the ranks of layout {layout} failed")
    finally:
        if group:
            group.close()
    rows = [json.loads(line) for line in Path(plan["rows"]).read_text().splitlines()]
    return rows, nbytes, copy_seconds(nbytes)


def table(rows: list[dict], copy_s: float) -> str:
    head = (
        "TPxPP | transport | MB | moved s | GB/s | of copy speed | x disk | checked s | x disk, checked | where moved"
    )
    lines = ["| " + head + " |", "| " + " | ".join(["---"] * len(head.split(" | "))) + " |"]
    disk = {row["layout"]: row for row in rows if row["transport"] == "disk"}
    for row in rows:
        slow = disk.get(row["layout"])
        phases = sorted(row["moved phases"].items(), key=lambda phase: -phase[1])[:4]
        cells = [
            row["layout"],
            row["transport"],
            f"{row['nbytes'] / 1e6:.0f}",
            f"{row['moved']:.3f}",
            f"{row['nbytes'] / row['moved'] / 1e9:.2f}",
            f"{copy_s / row['moved']:.0%}",
            f"{slow['moved'] / row['moved']:.1f}" if slow else "",
            f"{row['checked']:.3f}",
            f"{slow['checked'] / row['checked']:.1f}" if slow else "",
            ", ".join(f"{name} {seconds:.3f}" for name, seconds in phases),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=512, help="size of the model's weights (default 512)")
    parser.add_argument("--bucket-megabytes", type=int, default=128, help="sync.bucket_bytes in MiB (default 128)")
    parser.add_argument("--layouts", nargs="+", default=["1x1", "2x1", "1x2"], metavar="TPxPP")
    parser.add_argument("--engine", choices=["sglang", "vllm", "none"], default="sglang")
    parser.add_argument("--start-timeout", type=float, default=600, help="seconds, for the server (default 600)")
    parser.add_argument("--rank-plan", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_plan:
        run_rank(json.loads(args.rank_plan))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows, nbytes, copy_s = measure_all(args, Path(folder))
    load = os.getloadavg()
    text = (
        f"# Live weight sync\n\n{nbytes / 1e6:.0f} MB, buckets of {args.bucket_megabytes} MiB, engine {args.engine}, "
        f"median of {SYNCS} syncs; {datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores under a load "
        f"of {load[1]:.1f}, Python {platform.python_version()}. `python benchmarks/weight_sync.py`\n\n"
        f"A plain copy of these bytes by one thread takes {copy_s:.4f} s: {nbytes / copy_s / 1e9:.2f} GB/s.\n\n"
        + table(rows, copy_s)
    )
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
