"""GPU tests: skipped, with the reason, where something that they need is missing. One process and one GPU, but for
those that say they need two: they start ranks of their own."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # read when cuBLAS starts; see run.sh
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "distributed")]


def missing(*needs: str) -> str:
    """Why a test that needs `cuda`, `two_gpus`, `engine` (Transformer Engine), `sglang` or `vllm` cannot run here, or
    ""."""
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device"
    if "two_gpus" in needs and torch.cuda.device_count() < 2:
        return f"needs two GPUs; here is {torch.cuda.device_count()}"
    if "engine" in needs and importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed (bash tests/gpu/run.sh unpacks the offline bundle)"
    if "sglang" in needs and "NFT_SGLANG_PYTHONPATH" not in os.environ and importlib.util.find_spec("sglang") is None:
        return "SGLang is not installed (NFT_SGLANG_PYTHONPATH names a folder that holds it)"
    if "vllm" in needs:
        from megatron_nft.engines.engine import EngineError
        from megatron_nft.engines.host import find_python

        try:
            find_python("vllm", None)
        except EngineError as error:
            return str(error)
    return ""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*names): cuda, two_gpus, engine (Transformer Engine), sglang, vllm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        needs = {name for mark in item.iter_markers("needs") for name in mark.args}
        reason = missing(*needs)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def layout():
    """One rank with its GPU."""
    from megatron_nft.config import PolicyConfig
    from megatron_nft.policy import parallel

    yield parallel.initialize(PolicyConfig(), seed=1)
    parallel.shutdown()


@pytest.fixture(autouse=True)
def fresh_gpu():
    """Each test begins with an empty GPU and without the FP8 scales of models that are gone."""
    yield
    import torch

    if not torch.cuda.is_available():
        return
    gc.collect()
    torch.cuda.empty_cache()
    if "transformer_engine" in sys.modules:
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        FP8GlobalStateManager.reset()
