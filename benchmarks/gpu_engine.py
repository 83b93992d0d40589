"""One SGLang server of Qwen2.5-7B's shape on the trainer's GPU: weight sync, then generation.

Tables `weight_sync` and `generation`. The second sets our client beside SGLang's own bench_serving on the same server.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from gpu_common import Results, ceilings, spec_7b, verdict
from gpu_policies import fill_random
from gpu_servers import config_for, dummy, folder_7b, running

from megatron_nft.engines.engine import Engine, Request, SamplingParams
from megatron_nft.engines.sync import open_weight_sync
from megatron_nft.policy import parallel
from megatron_nft.policy.model import build_chunks

SYNCS = 6
PROMPT, RESPONSE = 128, 512
BATCHES = (256, 64)
BENCH_S = 240.0


def measure_sync(config, spec, layout, engine, chunks, copy: float) -> dict:
    """Medians of SYNCS - 1 syncs: the first one maps the buffer."""
    sync = open_weight_sync(config, spec, layout, engine)
    first = engine.weight_version + 1
    receipts = [sync.sync(chunks, version) for version in range(first, first + SYNCS)][1:]
    sync.close()
    seconds = statistics.median(sum(r.seconds.values()) for r in receipts)
    last = receipts[-1]
    share = 2 * last.nbytes / seconds / 1e12 / copy  # read once, written once
    figures = {"GB": last.nbytes / 1e9, "s": seconds, "share of copy": share, "checked": last.engine_checked}
    figures |= {"target s": verdict(seconds, at_most=0.3), "target share": verdict(share, at_least=0.15)}
    return figures | {f"{name} s": value for name, value in last.seconds.items()}


def generate(engine: Engine, batch: int, response: int = RESPONSE) -> dict:
    """Tokens per second of `batch` answers through our client."""
    rng = np.random.default_rng(batch)
    requests = [Request(rng.integers(10, 250, PROMPT).astype(np.int32), 1, (i,)) for i in range(batch)]
    list(engine.generate(requests[:8], SamplingParams(16)))
    started = time.perf_counter()
    lengths = [len(c.token_ids) for _, _, c in engine.generate(requests, SamplingParams(response))]
    seconds = time.perf_counter() - started
    return {"answers": batch, "tokens": sum(lengths), "s": seconds, "tokens/s": sum(lengths) / seconds}


def bench_serving(url: str, model: Path, batch: int) -> dict:
    """The same batch by SGLang's own benchmark. RuntimeError with its last line where it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.jsonl"
        command = [sys.executable, "-m", "sglang.bench_serving", "--backend=sglang", f"--base-url={url}"]
        command += [f"--model={model}", f"--tokenizer={model}", "--dataset-name=random-ids", "--disable-tqdm"]
        command += [f"--num-prompts={batch}", f"--random-input-len={PROMPT}", f"--random-output-len={RESPONSE}"]
        command += ["--random-range-ratio=1", f"--output-file={out}"]
        env = {**os.environ, "PYTHONPATH": os.environ.get("NFT_SGLANG_PYTHONPATH", "")}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=BENCH_S, check=False)
        if done.returncode or not out.exists():
            raise RuntimeError((done.stderr.strip().splitlines() or ["bench_serving gave no reason"])[-1])
        return {"answers": batch, "tokens/s": json.loads(out.read_text().splitlines()[-1])["output_throughput"]}


def main() -> None:
    syncs = Results("weight_sync", "28 layers of Qwen2.5-7B's shape, bf16, one GPU, CUDA IPC. Target: at most 0.3 s.")
    copy = syncs.add("ceilings of this run", **ceilings())["copy TB/s"]
    model, spec = folder_7b(), spec_7b(28)
    server = dummy(max_running_requests=256, max_in_flight=256)
    config = config_for(model, server=server)
    layout = parallel.initialize(config.policy, seed=1)
    chunks = build_chunks(spec, config.policy, layout)
    fill_random(chunks)
    with running(config, layout) as engine:
        for mib in (512, 2048):
            for check in (True, False):
                changed = config_for(model, server=server, sync={"bucket_bytes": mib << 20, "verify_checksums": check})
                row = f"buckets of {mib} MiB" + (", checksums compared" if check else ", not checked")
                syncs.measure(row, lambda c=changed: measure_sync(c, spec, layout, engine, chunks, copy))
        generation = Results(
            "generation",
            f"Prompts of {PROMPT} tokens, answers of {RESPONSE}, temperature 1, log-probs on. Target at batch 256: 90 "
            "percent of SGLang's bench_serving on the same server, which asks for no log-probs.",
        )
        for batch in BATCHES:
            theirs = generation.measure(
                f"bench_serving, batch {batch}", lambda b=batch: bench_serving(engine.urls[0], model, b)
            )
            ours = generation.measure(f"bf16, batch {batch}", lambda b=batch: generate(engine, b))
            if theirs and ours:
                share = ours["tokens/s"] / theirs["tokens/s"]
                generation.add(f"share of bench_serving, batch {batch}", target=verdict(share, at_least=0.9))


if __name__ == "__main__":
    main()
