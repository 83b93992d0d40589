"""The terms of the weight sync's cost that do not shrink with faster links: what a bucket costs whatever its size.

    python benchmarks/weight_sync_terms.py [--engine sglang|vllm] [--ranks 8]

One engine server on this machine loads buckets of several sizes out of shared memory, as the `tensor` transport gives
them: the least time of an HTTP call is a fixed part plus the bytes over a speed. `--ranks` processes then meet as the
ranks of a host do for each bucket (messages of the same length to the caller, its answer to them), and agree as all
ranks of a run do between the phases. Adds a table to benchmarks/results/weight_sync_terms.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from weight_sync import make_model

from megatron_nft.processes import free_port

RESULT = Path(__file__).resolve().parent / "results" / "weight_sync_terms.md"
BUCKET_MIB = (1, 4, 16, 64)
MEGABYTES = 192
REPEATS = 5


def least_and_median(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Seconds of `repeats` calls after one that does not count."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds), statistics.median(seconds)


# --- calls to a server ------------------------------------------------------------------------------------------------


def measure_calls(engine: str, start_timeout_s: float) -> list[dict]:
    """For each bucket size: bytes, length of the message, least and median seconds of a call."""
    from megatron_nft.config import RolloutConfig
    from megatron_nft.engines.open import engine_kind
    from megatron_nft.engines.start import start_servers
    from megatron_nft.weights.hf_folder import HFFolder

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        make_model(scratch / "model", MEGABYTES, "float32")
        rollout = RolloutConfig(engine=engine, server={"start_timeout_s": start_timeout_s})
        kind = engine_kind(engine)
        group = start_servers(
            kind, scratch / "model", rollout, precision="fp32", device="cpu", log_dir=scratch / "logs", weight_version=0
        )
        client = kind.client(group.urls, rollout.server, weight_version=0, group=group)
        weights = client._weight_client(group.urls[0], 600.0)
        try:
            weights.configure(weights.facts())
            return [measure_size(weights, HFFolder(scratch / "model"), mib << 20) for mib in BUCKET_MIB]
        finally:
            weights.close()
            client.close()


def measure_size(weights, source, bucket_bytes: int) -> dict:
    """Load one bucket of about this size, of the model's first tensors, again and again."""
    from megatron_nft.weights.buckets import Bucket, TensorMeta
    from megatron_nft.weights.shared_memory import shared_buffer

    metas, offset = [], 0
    for name, shape in source.shapes.items():
        end = offset + 4 * int(np.prod(shape))
        if end <= bucket_bytes:
            metas.append(TensorMeta(name, tuple(shape), torch.float32, offset, end))
            offset = end
    bucket = Bucket(metas, shared_buffer(offset, torch.device("cpu")))
    for name, tensor in bucket.tensors:
        tensor.copy_(source.read(name))
    weights.pause("abort")

    def call() -> None:
        weights.begin()
        start = time.perf_counter()
        weights.load_shared(bucket, [weights.share(bucket)])
        seconds.append(time.perf_counter() - start)
        weights.end(0)

    seconds: list[float] = []
    for _ in range(REPEATS + 1):
        call()
    weights.resume()
    length = len(json.dumps(weights.share(bucket)))
    return {"nbytes": offset, "message": length, "least": min(seconds[1:]), "median": statistics.median(seconds[1:])}


# --- ranks among themselves -------------------------------------------------------------------------------------------


def measure_meeting(num_ranks: int, message: int) -> dict[str, tuple[float, float]]:
    """Least and median seconds, on the first rank, of a meeting for one bucket and of an agreement."""
    context = multiprocessing.get_context("spawn")
    answers, port = context.SimpleQueue(), free_port()
    ranks = [context.Process(target=meet, args=(r, num_ranks, port, message, answers)) for r in range(num_ranks)]
    for rank in ranks:
        rank.start()
    found: dict[str, tuple[float, float]] = answers.get()
    for rank in ranks:
        rank.join()
    return found


def meet(rank: int, num_ranks: int, port: int, message: int, answers) -> None:
    from megatron_nft.distributed import any_of, gather_to_first, told_by_first

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_ranks)
    text = "x" * message

    def meeting() -> None:
        gather_to_first({("http://127.0.0.1:30000", rank): text}, dist.group.WORLD)
        told_by_first({}, dist.group.WORLD)

    found = {"meeting": least_and_median(meeting, 50)}
    found["agreement"] = least_and_median(lambda: any_of(False, dist.group.WORLD), 50)
    if rank == 0:
        answers.put(found)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=["sglang", "vllm"], default="sglang")
    parser.add_argument("--ranks", type=int, default=8, help="ranks that meet (default 8)")
    parser.add_argument("--start-timeout", type=float, default=900, help="seconds, for the server (default 900)")
    args = parser.parse_args()
    calls = measure_calls(args.engine, args.start_timeout)
    per_byte, fixed = np.polyfit([c["nbytes"] for c in calls], [c["least"] for c in calls], 1)
    met = measure_meeting(args.ranks, calls[-1]["message"])
    lines = [
        f"## {args.engine}\n",
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores under a load of "
        f"{os.getloadavg()[0]:.1f}, Python {platform.python_version()}, fp32, {REPEATS} calls each.\n",
        "| bucket MB | message KB | call, least ms | call, median ms |",
        "| --- | --- | --- | --- |",
        *(
            f"| {c['nbytes'] / 1e6:.1f} | {c['message'] / 1e3:.1f} | {c['least'] * 1e3:.1f} | {c['median'] * 1e3:.1f} |"
            for c in calls
        ),
        "",
        f"Line through the least times: {fixed * 1e3:.1f} ms a call + bytes at {1e-9 / per_byte:.2f} GB/s.",
        "",
        *(
            f"{name.capitalize()} of {args.ranks} ranks: {a * 1e3:.1f} ms at least, {b * 1e3:.1f} ms as a median.\n"
            for name, (a, b) in met.items()
        ),
    ]
    text = "\n".join(lines)
    head = "# What a bucket costs, whatever its size\n\n`python benchmarks/weight_sync_terms.py`\n\n"
    before = RESULT.read_text(encoding="utf-8") if RESULT.exists() else head
    RESULT.write_text(before + text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
