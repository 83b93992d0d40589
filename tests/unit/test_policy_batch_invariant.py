"""policy.batch_invariant: one setting for trainer and engine, what it needs, and megatron-core's replacement."""

import importlib.util
import sys
import types
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_policy_precision import H200, QWEN_7B

from megatron_nft.config import Config, PolicyConfig
from megatron_nft.policy import batch_invariant, model
from megatron_nft.policy.capability import check_gpu_stack, check_without_gpu

RUN = {"run_dir": "x", "model": {"path": "x"}, "data": {"train": ["x"]}}
ON = PolicyConfig(batch_invariant=True)
FLASH = replace(H200, flash_attention=True)


def config(rollout: dict, **policy: object) -> Config:
    return Config.model_validate({**RUN, "policy": {"batch_invariant": True, **policy}, "rollout": rollout})


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_one_setting_is_for_both_sides(engine):
    assert config({"engine": engine}).rollout.server.deterministic
    kept = config({"engine": engine, "server": {"num_servers": 2}}).rollout.server
    assert kept.deterministic and kept.num_servers == 2
    off = Config.model_validate({**RUN, "rollout": {"engine": engine}})
    assert not off.rollout.server.deterministic and not off.policy.batch_invariant


@pytest.mark.parametrize("rollout", [{}, {"engine": "sglang", "server": {"deterministic": False}}])
def test_one_side_alone_is_refused(rollout):
    with pytest.raises(ValueError, match=r"policy\.batch_invariant=true is for trainer and engine"):
        config(rollout)


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ({"precision": "fp32"}, "not precision=fp32"),
        ({"layer_spec": "local"}, "not layer_spec=local"),
        ({"attention_backend": "fused"}, "not attention_backend=fused"),
        ({"fp8": {"recipe": "tensorwise"}}, r"not fp8\.recipe=tensorwise"),
        (
            {"tp_comm_overlap": True, "tensor_model_parallel_size": 2, "sequence_parallel": True},
            "not tp_comm_overlap=True",
        ),
    ],
)
def test_what_its_kernels_do_not_have_is_refused(policy, said):
    with pytest.raises(ValueError, match=f"batch_invariant=true needs .* {said}"):
        PolicyConfig(batch_invariant=True, **policy)


def test_the_gpu_stack_must_have_its_attention():
    check_gpu_stack(ON, FLASH)
    with pytest.raises(ValueError, match=r"batch_invariant=true needs the package flash-attn"):
        check_gpu_stack(ON, H200)
    with pytest.raises(ValueError, match=r"needs Transformer Engine 2\.10 or newer.*2\.9\.0 is installed"):
        check_gpu_stack(ON, replace(FLASH, transformer_engine="2.9.0"))


def test_a_cpu_has_none_of_it():
    check_without_gpu(PolicyConfig())
    with pytest.raises(ValueError, match=r"policy\.batch_invariant=true needs Transformer Engine on GPUs"):
        check_without_gpu(ON)


def test_experts_are_refused():
    batch_invariant.check_model(QWEN_7B)
    with pytest.raises(ValueError, match="grouped products of 8 experts"):
        batch_invariant.check_model(replace(QWEN_7B, experts=SimpleNamespace(count=8)))


def test_megatron_gets_the_mode_and_its_attention():
    made = model.transformer_config(QWEN_7B, ON)
    assert made.batch_invariant_mode and made.attention_backend.name == "flash"
    assert not model.transformer_config(QWEN_7B, PolicyConfig()).batch_invariant_mode


@pytest.fixture
def kernels(monkeypatch):
    """A stand-in for megatron-core's module, which would replace torch's products on this CPU."""
    made, said = types.ModuleType(batch_invariant.KERNELS), []
    made.enable_batch_invariant_mode = lambda: said.append("on")
    made.disable_batch_invariant_mode = lambda: said.append("off")
    package = types.ModuleType("custom_layers")
    package.batch_invariant_kernels = made
    monkeypatch.setitem(sys.modules, "megatron.core.transformer.custom_layers", package)
    monkeypatch.delitem(sys.modules, batch_invariant.KERNELS, raising=False)
    return SimpleNamespace(module=made, said=said)


def test_kernels_are_replaced_and_put_back(kernels, monkeypatch):
    batch_invariant.use_batch_invariant_kernels(False)  # nothing was replaced: nothing is imported
    assert kernels.said == []
    batch_invariant.use_batch_invariant_kernels(True)
    monkeypatch.setitem(sys.modules, batch_invariant.KERNELS, kernels.module)  # as its import leaves it
    batch_invariant.use_batch_invariant_kernels(False)
    assert kernels.said == ["on", "off"]


def test_a_product_of_the_installed_megatron_still_drops_accumulate():
    """Why Transformer Engine must not add to the main gradient in this mode. Where this fails, it may again."""
    folder = Path(importlib.util.find_spec("megatron.core").origin).parent
    source = (folder / "transformer" / "custom_layers" / "batch_invariant_kernels.py").read_text()
    for name in ("def enable_batch_invariant_mode", "def disable_batch_invariant_mode", "out.copy_(result)"):
        assert name in source
    assert "accumulate" not in source.split("def _te_general_gemm_patched")[1].split("\nclass ")[0]
