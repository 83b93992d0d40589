"""Where FP8 takes part outside the training step: behaviour log-probs, the probe, and engines that quantize."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_nft.config import Config
from megatron_nft.engines.sync import open_weight_sync
from megatron_nft.policy import policy as module
from megatron_nft.policy.family import spec_from_config
from megatron_nft.weights.sync import WeightSync, WeightSyncError

FIGURES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}


@pytest.fixture
def recipes(monkeypatch):
    """(compute_logprobs of a policy with the given fp8 settings, the recipes under which its forward passes ran)."""
    seen = []

    def forward(wrapped, *_, with_entropy):
        assert not with_entropy
        seen.append(wrapped[0].module.config.fp8)
        return [torch.zeros(1, 3)]

    monkeypatch.setattr(module, "forward_logprobs", forward)
    monkeypatch.setattr(module, "check_micro_batches", lambda *_: None)

    def make(**fp8):
        settings = config("sglang", "none", fp8={"recipe": "tensorwise", **fp8})
        chunk = SimpleNamespace(config=SimpleNamespace(fp8="hybrid", fp4=None))
        wrapped = [SimpleNamespace(module=chunk, eval=lambda: None)]
        return module.Policy(settings, SimpleNamespace(vocab_size=8), None, wrapped, None, None).compute_logprobs

    return make, seen


def test_behaviour_logprobs_follow_the_setting_and_the_probe_is_never_quantized(recipes):
    make, seen = recipes
    make()([])
    make(logprobs=False)([])
    make()([], quantized=False)
    make(logprobs=False)([], quantized=True)
    assert seen == ["hybrid", None, None, "hybrid"]


def config(engine: str, quantization: str, **policy) -> Config:
    return Config.model_validate(
        {
            "run_dir": "unused",
            "model": {"path": "unused"},
            "data": {"train": ["unused"]},
            "rollout": {"engine": engine, "server": {"quantization": quantization, "urls": ["http://127.0.0.1:1"]}},
            "policy": policy,
        }
    )


def test_models_that_the_quantizing_engine_cannot_update_are_refused():
    qwen3 = spec_from_config(FIGURES | {"model_type": "qwen3"})
    with pytest.raises(ValueError, match=r"quantization=fp8 .* query and key norms come out wrong"):
        open_weight_sync(config("sglang", "fp8"), qwen3, None, None)


@pytest.mark.parametrize(
    ("quantization", "difference", "accepted"), [("none", 1.0, False), ("fp8", 1.0, True), ("fp8", 3.0, False)]
)
def test_the_probe_allows_more_of_an_engine_that_quantizes(quantization, difference, accepted):
    transport = SimpleNamespace(probe=lambda token_ids, logprobs: difference, allocate=None)
    layout = SimpleNamespace(device=torch.device("cpu"))
    sync = WeightSync(config("sglang", quantization), None, layout, transport, None)
    probe = np.zeros(2, np.int32), np.zeros(1, np.float32)
    if accepted:
        assert sync._probe(probe) == difference
    else:
        with pytest.raises(WeightSyncError, match=r"more than sync\.probe_tolerance"):
            sync._probe(probe)
