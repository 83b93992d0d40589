"""Where FP8 takes part outside the training step: behaviour log-probs, the probe, and engines that quantize."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_nft.config import Config
from megatron_nft.engines.sglang import kind
from megatron_nft.engines.sglang.client import SGLangEngine
from megatron_nft.engines.sglang.quantized import check_release
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
        spec, layout = (
            SimpleNamespace(vocab_size=8),
            SimpleNamespace(device=torch.device("cpu"), cp=SimpleNamespace(size=1)),
        )
        return module.Policy(settings, spec, layout, wrapped, None, None).compute_logprobs

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


RELEASES = {  # read in SGLang's own loader of each release
    "0.5.17": {"qwen2", "llama"},
    "0.5.20": {"qwen2", "llama"},
    "0.5.20.post1": {"qwen2", "llama"},
    "0.5.21": set(),
    "0.5.22rc1": {"qwen2", "qwen3"},
    "0.5.22": {"qwen2", "qwen3"},
    "0.5.23": {"qwen2", "qwen3"},
    "": {"qwen2"},  # whichever it is
}


@pytest.mark.parametrize("version", RELEASES)
def test_a_release_that_cannot_update_a_model_is_refused(version):
    for family in ("qwen2", "qwen3", "llama", "qwen3_moe"):
        if family in RELEASES[version]:
            check_release(version, family)
        else:
            with pytest.raises(ValueError, match=f"live updates of a {family} model into FP8 weights"):
                check_release(version, family)


@pytest.mark.parametrize(
    ("version", "family", "able"),
    [
        ("0.5.17", "qwen3", r"releases that can: 0\.5\.22 or newer\."),
        ("0.5.23", "llama", r"releases that can: 0\.5\.20 or older\."),
        ("0.5.21", "qwen2", r"releases that can: 0\.5\.20 or older, 0\.5\.22 or newer\."),
        ("0.5.23", "qwen3_moe", r"releases that can: none up to 0\.5\.23\."),
    ],
)
def test_the_refusal_names_the_release_that_can(version, family, able):
    with pytest.raises(ValueError, match=rf"SGLang {re.escape(version)}: .*{able}"):
        check_release(version, family)


def test_the_server_is_asked_for_its_release(monkeypatch):
    asked = []

    def answer(url, paths, key):
        asked.append((url, paths[0], key))
        return {"version": "0.5.20"}

    monkeypatch.setattr(kind, "first_answer", answer)
    engine = SGLangEngine.__new__(SGLangEngine)
    engine.urls, engine.key = ["http://a:1", "http://b:1"], "secret"
    qwen3 = spec_from_config(FIGURES | {"model_type": "qwen3"})
    with pytest.raises(ValueError, match=r"SGLang 0\.5\.20: live updates of a qwen3 model"):
        open_weight_sync(config("sglang", "fp8"), qwen3, None, engine)
    assert asked == [("http://a:1", "/server_info", "secret")]
    kind.check_updates(config("sglang", "none").rollout, qwen3, engine)  # nothing is asked where nothing is quantized
    assert len(asked) == 1


def test_the_probe_allows_more_of_an_fp8_cache():
    transport = SimpleNamespace(probe=lambda token_ids, logprobs: 1.0, allocate=None)
    layout = SimpleNamespace(device=torch.device("cpu"))
    server = {"kv_cache_dtype": "fp8_e4m3", "urls": ["http://127.0.0.1:1"]}
    settings = config("sglang", "none").model_dump() | {"rollout": {"engine": "sglang", "server": server}}
    sync = WeightSync(Config.model_validate(settings), None, layout, transport, None)
    assert sync._probe((np.zeros(2, np.int32), np.zeros(1, np.float32))) == 1.0


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
