"""Generation with CUDA graphs off, with FP8 weights and cache, and with batch-invariant kernels, beside the rows of
gpu_engine.py; a server each."""

from __future__ import annotations

import time

from gpu_common import Results
from gpu_engine import RESPONSE, generate
from gpu_servers import config_for, dummy, folder_7b, running

from megatron_nft.policy import parallel

SERVERS = {
    "CUDA graphs": {},
    "CUDA graphs off": {"cuda_graphs": False},
    "FP8 weights": {"quantization": "fp8"},
    "FP8 KV cache": {"kv_cache_dtype": "fp8_e4m3"},
    "batch-invariant": {"deterministic": True},
}
BATCHES = (16, 256)


def main() -> None:
    results = Results("decoding", f"28 layers of Qwen2.5-7B's shape, answers of {RESPONSE} tokens, by server.")
    folder = folder_7b()
    for name, changes in SERVERS.items():
        rows = {f"{name}, batch {n}": n for n in BATCHES}
        if all(results.get(row) for row in rows):
            continue
        server = dummy(max_running_requests=256, max_in_flight=256, **changes)
        server["extra_args"] = [*server["extra_args"], "--weight-version=0"]
        config = config_for(folder, server=server)
        started = time.perf_counter()
        with running(config, parallel.initialize(config.policy, seed=1)) as engine:
            start_s = time.perf_counter() - started
            engine.weight_version = 0
            for row, batch in rows.items():
                results.measure(row, lambda b=batch, s=start_s: {"start s": s, **generate(engine, b)})


if __name__ == "__main__":
    main()
