"""Weight sync of a 7B-shaped model into SGLang on the same GPU: seconds, and the share of the copy bandwidth."""

from __future__ import annotations

import statistics

from gpu_common import Results, ceilings, spec_7b, verdict
from gpu_policies import fill_random
from gpu_servers import config_for, dummy, folder_7b, running

from megatron_nft.engines.sync import open_weight_sync
from megatron_nft.policy import parallel
from megatron_nft.policy.model import build_chunks

SYNCS = 6


def measure(config, spec, layout, engine, chunks, copy: float) -> dict:
    sync = open_weight_sync(config, spec, layout, engine)
    receipts = [sync.sync(chunks, version) for version in range(1, SYNCS + 1)][1:]  # the first one maps the buffer
    sync.close()
    seconds = statistics.median(sum(r.seconds.values()) for r in receipts)
    last = receipts[-1]
    phases = {f"{name} s": value for name, value in last.seconds.items()}
    rate = 2 * last.nbytes / seconds / 1e12  # read once, written once
    figures = {"GB": last.nbytes / 1e9, "s": seconds, "share of copy": rate / copy, "checked": last.engine_checked}
    figures["target s"] = verdict(seconds, at_most=0.5)
    return figures | phases


def main() -> None:
    results = Results("weight_sync", "28 layers of Qwen2.5-7B's shape, bf16, one GPU, CUDA IPC. Target: under 0.5 s.")
    copy = results.add("ceilings of this run", **ceilings())["copy TB/s"]
    model, spec = folder_7b(), spec_7b(28)
    config = config_for(model, server=dummy())
    layout = parallel.initialize(config.policy, seed=1)
    chunks = build_chunks(spec, config.policy, layout)
    fill_random(chunks)
    with running(config, layout) as engine:
        for mib in (512, 2048):
            for check in (True, False):
                changed = config_for(model, server=dummy(), sync={"bucket_bytes": mib << 20, "verify_checksums": check})
                row = f"buckets of {mib} MiB" + (", checksums compared" if check else ", not checked")
                results.measure(row, lambda c=changed: measure(c, spec, layout, engine, chunks, copy))


if __name__ == "__main__":
    main()
