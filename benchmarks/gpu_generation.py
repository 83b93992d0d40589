"""SGLang on one GPU through our client: tokens per second at batch 256, 7B-shaped, answers of equal length."""

from __future__ import annotations

import time

import numpy as np
from gpu_common import Results
from gpu_servers import config_for, dummy, folder_7b, running

from megatron_nft.engines.engine import Request, SamplingParams
from megatron_nft.policy import parallel

PROMPT, RESPONSE = 128, 512


def measure(engine, batch: int) -> dict:
    rng = np.random.default_rng(batch)
    requests = [Request(rng.integers(10, 250, PROMPT).astype(np.int32), 1, (i,)) for i in range(batch)]
    engine.weight_version = 0
    list(engine.generate(requests[:8], SamplingParams(16)))
    started = time.perf_counter()
    lengths = [len(c.token_ids) for _, _, c in engine.generate(requests, SamplingParams(RESPONSE))]
    seconds = time.perf_counter() - started
    return {"answers": batch, "tokens": sum(lengths), "s": seconds, "tokens/s": sum(lengths) / seconds}


def main() -> None:
    results = Results("generation", f"Prompts of {PROMPT} tokens, answers of {RESPONSE}, temperature 1, log-probs on.")
    folder = folder_7b()
    for name, changes in (("bf16", {}), ("FP8 weights", {"quantization": "fp8"})):
        rows = {f"{name}, batch {n}": n for n in (256, 64)}
        if all(results.get(row) for row in rows):
            continue
        server = dummy(max_running_requests=256, max_in_flight=256, **changes)
        server["extra_args"] = [*server["extra_args"], "--weight-version=0"]
        config = config_for(folder, server=server)
        layout = parallel.initialize(config.policy, seed=1)
        with running(config, layout) as engine:
            for row, batch in rows.items():
                results.measure(row, lambda batch=batch: measure(engine, batch))


if __name__ == "__main__":
    main()
