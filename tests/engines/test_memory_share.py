"""plan/engine.py against the engines' own code, which runs in their environments with given sizes.

The functions are internal to the engines: a release that renames them needs another look at what a share means.
"""

from __future__ import annotations

import subprocess

import pytest
from environments import install

from megatron_nft.config import Config
from megatron_nft.engines.start import find_python
from megatron_nft.plan.engine import engine_memory
from megatron_nft.plan.hardware import CHIPS, Chip
from megatron_nft.policy.family import spec_from_config

pytestmark = pytest.mark.long  # tests/unit/test_plan_command.py has the same shares worked out by hand

SPEC = spec_from_config(
    {
        "model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
        "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064, "max_position_embeddings": 131072,
    }
)  # fmt: skip
CHIP: Chip = CHIPS["h100"]
HELD = 15_000_000_000  # of the trainer

SGLANG = """
import sys
from types import SimpleNamespace as N
import sglang.srt.mem_cache.kv_cache_configurator as module
free, weights, fraction = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
module.get_available_gpu_memory = lambda *args, **more: (free - weights) / 2**30  # once the weights are loaded
module.get_parallel = lambda: N(launch_world_size=1, world_group=N(cpu_group=None))
module.get_schedule = lambda: N(
    mem_fraction_static=fraction, prefill_max_requests=None, max_mamba_cache_size=None
)
prefill = N(full_prefill_max_req=None, backend=None)
module.get_exec = lambda: N(graph=N(cuda_graph_config=N(prefill=prefill)))
module.get_disagg = lambda: N(disaggregation_mode="null")
module.get_mm = lambda: N(mm_feature_transport="cpu")
runner = N(
    device="cuda", gpu_id=0, mambaish_config=None, post_capture_kv_active=False, model_config=N(is_multimodal=False)
)
(measures,) = (c for c in vars(module).values() if isinstance(c, type) and "_profile_available_bytes" in vars(c))
print(measures._profile_available_bytes(runner, free / 2**30))
"""

VLLM = """
import sys
from types import SimpleNamespace as N
from vllm.v1.worker.utils import request_memory
free, total, fraction = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
snapshot = N(total_memory=total, free_memory=free, device_="cuda:0")
print(request_memory(snapshot, N(gpu_memory_utilization=fraction)))
"""


def settings(engine: str, fraction: float) -> Config:
    server = {"tensor_parallel_size": 4, "mem_fraction_static": fraction}
    values = {"run_dir": "x", "model": {"path": "x"}, "data": {"train": ["x"]}}
    return Config.model_validate(values | {"rollout": {"engine": engine, "server": server}})


def ask(engine: str, script: str, *arguments: float) -> subprocess.CompletedProcess:
    install(engine)
    command = [find_python(engine, None), "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_sglang_gives_its_cache_what_plan_says():
    engine = engine_memory(SPEC, settings("sglang", 0.8), CHIP, HELD)
    done = ask("sglang", SGLANG, engine.free, engine.weights, 0.8)
    assert done.returncode == 0, done.stderr
    assert abs(int(done.stdout.splitlines()[-1]) - engine.kv_cache) < 1024


def test_vllm_asks_for_what_plan_says_and_does_not_start_with_more_than_is_free():
    fits, too_much = (engine_memory(SPEC, settings("vllm", fraction), CHIP, HELD) for fraction in (0.7, 0.8))
    done = ask("vllm", VLLM, fits.free, CHIP.memory_bytes, 0.7)
    assert done.returncode == 0, done.stderr
    assert abs(int(done.stdout.splitlines()[-1]) - fits.budget) <= 1
    assert fits.weights + fits.kv_cache + fits.working == fits.budget
    assert too_much.budget > too_much.free
    refused = ask("vllm", VLLM, too_much.free, CHIP.memory_bytes, 0.8)
    assert refused.returncode == 1 and "is less than desired GPU memory utilization" in refused.stderr
