"""An engine's server on the trainer's GPU, for the tests and benchmarks of the GPU path."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
from gpu_policies import make_samples, packed

from megatron_nft.engines.engine import Engine
from megatron_nft.engines.open import create_engine
from megatron_nft.engines.sync import open_weight_sync
from megatron_nft.policy.policy import Policy
from megatron_nft.weights.receipt import Receipt
from megatron_nft.weights.sync import WeightSync

LEAST_COMPILATION = ["--attention-backend=fa3", "--sampling-backend=pytorch", "--grammar-backend=none"]
PROBE_TOKENS = 48


def server_settings(**changes: object) -> dict:
    """rollout.server settings for one GPU; SGLang from NFT_SGLANG_PYTHONPATH, where that is set."""
    found = os.environ.get("NFT_SGLANG_PYTHONPATH")
    settings = {
        "mem_fraction_static": 0.2,
        "max_running_requests": 64,
        "start_timeout_s": 240,
        "extra_args": list(LEAST_COMPILATION),
    }
    if found:
        settings |= {"python": sys.executable, "env": {"PYTHONPATH": found}}
    return settings | changes


def start_engine(policy: Policy, run_dir: Path) -> tuple[Engine, WeightSync]:
    """Server, client and weight sync of a policy whose settings name a `rollout.engine` with servers. Close both."""
    config = policy.config.model_copy(update={"run_dir": run_dir})
    engine = create_engine(config, policy.layout)
    try:
        return engine, open_weight_sync(config, policy.spec, policy.layout, engine)
    except BaseException:
        engine.close()
        raise


def checked_sync(policy: Policy, sync: WeightSync, version: int) -> Receipt:
    """A weight sync with a probe, as the loop makes it."""
    (sample,) = make_samples([PROBE_TOKENS], min(policy.spec.vocab_size, 256), seed=7)
    (logprobs,) = policy.compute_logprobs(packed(policy, [sample]))
    probe = np.asarray(sample.input_ids), logprobs[: PROBE_TOKENS - 1]
    return sync.sync(policy.chunks, version, probe=probe)


def used_bytes() -> int:
    """Held on the GPU by all processes."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free
