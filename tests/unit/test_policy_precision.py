"""FP8 settings: what megatron-core gets, what is refused before anything is built, and bf16 forward passes."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from megatron_nft.config import FP8_ALIGNMENT, Config, Fp8Config, PolicyConfig, RolloutConfig
from megatron_nft.policy import capability, model, precision
from megatron_nft.policy.capability import NEEDS, GpuStack, check_gpu_stack, read_gpu_stack
from megatron_nft.policy.family import spec_from_config

FIGURES = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 4096,
}  # fmt: skip
QWEN_7B = spec_from_config(FIGURES)
H200 = GpuStack("NVIDIA H200", (9, 0), (13, 0), (9, 19, 0), "2.11.0", False)
A100 = replace(H200, chip="NVIDIA A100", capability=(8, 0))
L40 = replace(H200, chip="NVIDIA L40", capability=(8, 9))
B200 = replace(H200, chip="NVIDIA B200", capability=(10, 0))
RTX_5090 = replace(H200, chip="NVIDIA GeForce RTX 5090", capability=(12, 0))


def policy(recipe: str, **settings: object) -> PolicyConfig:
    return PolicyConfig.model_validate({"fp8": {"recipe": recipe}, **settings})


@pytest.mark.parametrize("recipe", [r for r in FP8_ALIGNMENT if r != "none"])
def test_megatron_core_takes_the_fields_of_every_recipe(recipe):
    from megatron.core.transformer.transformer_config import TransformerConfig

    fields = precision.transformer_fields(Fp8Config(recipe=recipe))
    config = TransformerConfig(num_layers=4, hidden_size=64, num_attention_heads=4, bf16=True, **fields)
    assert (config.fp4, config.fp8) == (("e2m1", None) if recipe == "nvfp4" else (None, "hybrid"))
    assert (config.fp4_recipe if recipe == "nvfp4" else config.fp8_recipe) == recipe
    if recipe == "delayed":
        assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (1024, "max")


def test_layers_in_bf16_reach_megatron_core_only_where_they_are_set():
    none = precision.transformer_fields(Fp8Config(recipe="tensorwise"))
    some = precision.transformer_fields(Fp8Config(recipe="blockwise", format="e4m3", num_layers_at_end_in_bf16=2))
    assert none["first_last_layers_bf16"] is False
    assert some["first_last_layers_bf16"] is True
    assert (some["num_layers_at_start_in_bf16"], some["num_layers_at_end_in_bf16"]) == (0, 2)
    assert some["fp8"] == "e4m3"
    assert precision.transformer_fields(Fp8Config()) == {}


@pytest.mark.parametrize(
    ("recipe", "tp", "sequence_parallel", "multiple"),
    [
        ("none", 1, False, 1),
        ("none", 4, True, 4),
        ("none", 4, False, 1),
        ("delayed", 1, False, 16),
        ("tensorwise", 8, True, 128),
        ("blockwise", 2, True, 256),
        ("blockwise", 2, False, 128),
        ("mxfp8", 4, True, 128),
        ("nvfp4", 1, False, 64),
    ],
)
def test_tokens_are_padded_for_recipe_and_sequence_parallelism(recipe, tp, sequence_parallel, multiple):
    settings = policy(recipe, tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel)
    assert settings.token_multiple == multiple


@pytest.mark.parametrize(
    ("recipe", "cp", "tp", "multiple"),
    [
        ("none", 2, 1, 4),
        ("none", 4, 1, 8),
        ("none", 2, 2, 4),  # 2 per rank, 1 per rank and TP share
        ("none", 2, 3, 12),  # a rank's 6 tokens in two chunks, and in three shares
        ("tensorwise", 2, 2, 64),  # 32 per rank, 16 per share
    ],
)
def test_tokens_are_padded_for_context_parallelism(recipe, cp, tp, multiple):
    settings = policy(recipe, context_parallel_size=cp, tensor_model_parallel_size=tp, sequence_parallel=tp > 1)
    assert settings.token_multiple == multiple and settings.segment_multiple == 2 * cp


def test_context_parallel_attention_of_transformer_engine_needs_bf16():
    check_gpu_stack(policy("none", context_parallel_size=2), H200)
    with pytest.raises(ValueError, match=r"context_parallel_size=2 with policy.precision=fp32.*16 bits alone"):
        check_gpu_stack(policy("none", context_parallel_size=2, precision="fp32"), H200)


def test_the_longest_answer_must_fit_when_padded():
    settings = {
        "run_dir": "x", "model": {"path": "x"}, "data": {"train": ["x"], "max_prompt_tokens": 100},
        "rollout": {"max_response_tokens": 200}, "policy": {"micro_batch_tokens": 300},
    }  # fmt: skip
    Config.model_validate(settings)
    settings["policy"]["fp8"] = {"recipe": "blockwise"}
    with pytest.raises(ValidationError, match=r"micro_batch_tokens \(300\).*= 300, padded to a multiple of 128"):
        Config.model_validate(settings)
    settings["policy"]["micro_batch_tokens"] = 384
    Config.model_validate(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fp8": {"recipe": "delayed", "num_layers_at_start_in_bf16": 1}}, "delayed cannot keep 1 layers in bf16"),
        ({"fp8": {"recipe": "nvfp4", "format": "e4m3"}}, "format=e4m3 has no meaning for recipe=nvfp4"),
        ({"fp8": {"recipe": "tensorwise"}, "precision": "fp32"}, "needs precision=bf16, not fp32"),
        ({"fp8": {"recipe": "tensorwise"}, "layer_spec": "local"}, "not local"),
        ({"optimizer_offload": True, "precision": "fp32"}, "optimizer_offload needs precision=bf16"),
        ({"optimizer_offload": True, "use_distributed_optimizer": False}, "use_distributed_optimizer=true"),
    ],
)
def test_wrong_combinations_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        PolicyConfig.model_validate(settings)


def test_memory_saver_belongs_to_servers_of_the_run():
    for engine in ("sglang", "vllm"):
        RolloutConfig.model_validate({"engine": engine, "server": {"memory_saver": True}})
        with pytest.raises(ValidationError, match="servers that others run"):
            RolloutConfig.model_validate({"engine": engine, "server": {"memory_saver": True, "urls": ["http://x:1"]}})
    with pytest.raises(ValidationError, match="engine=embedded"):
        RolloutConfig.model_validate({"engine": "embedded", "server": {"memory_saver": True}})


def test_sizes_that_a_recipe_cannot_cut_are_named():
    precision.check_sizes(QWEN_7B, policy("blockwise"))
    precision.check_sizes(QWEN_7B, policy("tensorwise", tensor_model_parallel_size=4))
    # 18944 / 4 = 4736 = 37 x 128; (3584 + 2 x 512) / 4 = 1152 = 9 x 128; 3584 / 4 = 896 = 7 x 128
    precision.check_sizes(QWEN_7B, policy("blockwise", tensor_model_parallel_size=4))
    with pytest.raises(ValueError, match="multiples of 128: hidden_size is 3600 with TP 1"):
        precision.check_sizes(replace(QWEN_7B, hidden_size=3600), policy("blockwise"))
    with pytest.raises(ValueError, match="multiples of 16: MLP width per rank is 4740 with TP 4"):
        precision.check_sizes(
            replace(QWEN_7B, ffn_hidden_size=18960), policy("tensorwise", tensor_model_parallel_size=4)
        )


def test_bf16_layers_beyond_a_pipeline_stage_are_refused():
    settings = {"recipe": "tensorwise", "num_layers_at_end_in_bf16": 8}
    precision.check_sizes(QWEN_7B, PolicyConfig.model_validate({"fp8": settings}))
    with pytest.raises(ValueError, match="num_layers_at_end_in_bf16 is 8; at most 7 layers"):
        precision.check_sizes(
            QWEN_7B, PolicyConfig.model_validate({"fp8": settings, "pipeline_model_parallel_size": 4})
        )


def test_bf16_forward_passes_leave_the_settings_as_they_were():
    shared = SimpleNamespace(fp8="hybrid", fp4=None)
    other = SimpleNamespace(fp8=None, fp4="e2m1")
    chunks = [SimpleNamespace(config=c) for c in (shared, shared, other)]
    with precision.in_bf16(chunks):
        assert [(c.config.fp8, c.config.fp4) for c in chunks] == [(None, None)] * 3
    assert (shared.fp8, shared.fp4, other.fp8, other.fp4) == ("hybrid", None, None, "e2m1")
    with pytest.raises(RuntimeError), precision.in_bf16(chunks):
        raise RuntimeError
    assert (shared.fp8, other.fp4) == ("hybrid", "e2m1")


@pytest.mark.parametrize(
    ("stack", "allowed"),
    [
        (A100, ["none"]),
        (L40, ["none", "delayed", "tensorwise"]),
        (H200, ["none", "delayed", "tensorwise", "blockwise"]),
        (replace(H200, cuda=(12, 8)), ["none", "delayed", "tensorwise"]),
        (B200, ["none", "delayed", "tensorwise", "blockwise", "mxfp8", "nvfp4"]),
        (RTX_5090, ["none", "delayed", "tensorwise", "blockwise", "nvfp4"]),
    ],
)
def test_each_chip_has_its_recipes(stack, allowed):
    assert set(NEEDS) | {"none"} == set(FP8_ALIGNMENT)
    assert capability.allowed_recipes(stack) == allowed
    stack = replace(stack, flash_attention=True)  # not what is asked here
    for recipe in FP8_ALIGNMENT:
        if recipe in allowed:
            check_gpu_stack(policy(recipe), stack)
        else:
            with pytest.raises(ValueError, match=f"recipe={recipe} needs .* Allowed here: {', '.join(allowed)}"):
                check_gpu_stack(policy(recipe), stack)


def test_the_message_names_chip_capability_and_what_is_allowed():
    with pytest.raises(ValueError) as error:
        check_gpu_stack(policy("mxfp8"), H200)
    assert str(error.value) == (
        "policy.fp8.recipe=mxfp8 needs compute capability 10.0 or above, below 12.0; NVIDIA H200 has 9.0. "
        "Allowed here: none, delayed, tensorwise, blockwise"
    )


def test_packed_attention_needs_a_kernel_that_has_it():
    check_gpu_stack(policy("none"), H200)
    old = replace(H200, cudnn=(9, 5, 1))
    with pytest.raises(ValueError, match=r"cuDNN 9.6 or newer.*here are cuDNN 9\.5\.1, NVIDIA H200 with 9\.0"):
        check_gpu_stack(policy("none"), old)
    check_gpu_stack(policy("none"), replace(old, flash_attention=True))
    check_gpu_stack(policy("none", precision="fp32"), old)
    with pytest.raises(ValueError, match=r"NVIDIA A100 with 8\.0 and no flash-attn"):
        check_gpu_stack(policy("none"), A100)


def test_an_attention_backend_that_is_not_there_is_refused():
    check_gpu_stack(policy("none", attention_backend="fused"), H200)
    with pytest.raises(ValueError, match=r"=flash needs the package flash-attn, .* Allowed here: auto, fused"):
        check_gpu_stack(policy("none", attention_backend="flash"), H200)
    with_flash = replace(A100, flash_attention=True)
    check_gpu_stack(policy("none", attention_backend="flash"), with_flash)
    with pytest.raises(
        ValueError, match=r"=fused needs cuDNN 9\.6 .* NVIDIA A100 with 8\.0\. Allowed here: auto, flash"
    ):
        check_gpu_stack(policy("none", attention_backend="fused"), with_flash)


@pytest.mark.parametrize("other", [{"precision": "fp32"}, {"layer_spec": "local"}])
def test_an_attention_backend_belongs_to_transformer_engine_in_16_bits(other):
    with pytest.raises(ValueError, match="attention_backend=flash needs precision=bf16 and layer_spec auto or"):
        PolicyConfig(attention_backend="flash", **other)


@pytest.mark.parametrize("backend", ["auto", "flash", "fused"])
def test_the_attention_backend_reaches_megatron(backend):
    config = model.transformer_config(QWEN_7B, PolicyConfig(attention_backend=backend))
    assert config.attention_backend.name == backend


def test_an_old_transformer_engine_is_refused():
    with pytest.raises(ValueError, match=r"Transformer Engine 2\.8\.0 is installed; .* needs 2\.9 or newer"):
        check_gpu_stack(policy("none"), replace(H200, transformer_engine="2.8.0"))


def test_the_machine_is_read_from_torch_and_the_installed_packages(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(capability, "cudnn_versions", lambda: ((9, 19, 0), (9, 14, 0)))  # torch itself would raise
    monkeypatch.setattr(capability.importlib.metadata, "version", {"transformer-engine": "2.11.0"}.__getitem__)
    monkeypatch.setattr(capability.importlib.util, "find_spec", lambda name: None)
    assert read_gpu_stack() == replace(H200, cudnn=(9, 14, 0), built_for_cudnn=(9, 19, 0))


@pytest.mark.parametrize(
    ("loaded", "fits"),
    [((9, 14, 0), False), ((8, 20, 0), False), ((9, 19, 0), True), ((9, 20, 1), True), ((10, 19, 0), False)],
)
def test_a_cudnn_that_torch_was_not_built_for_is_refused(loaded, fits):
    stack = replace(H200, cudnn=loaded, built_for_cudnn=(9, 19, 0))
    if fits:
        check_gpu_stack(policy("none"), stack)
    else:
        with pytest.raises(
            ValueError, match=rf"cuDNN {'.'.join(map(str, loaded))} is loaded, torch was built for 9\.19\.0"
        ):
            check_gpu_stack(policy("none"), stack)


def test_a_model_is_not_built_on_a_chip_without_the_recipe(monkeypatch):
    monkeypatch.setattr(model, "uses_transformer_engine", lambda policy: True)
    monkeypatch.setattr(model, "read_gpu_stack", lambda device: A100)
    with pytest.raises(ValueError, match=r"NVIDIA A100 has 8\.0\. Allowed here: none"):
        model.build_chunks(QWEN_7B, policy("tensorwise"), SimpleNamespace(device="cuda", vpp_size=None))


@pytest.mark.parametrize(
    ("settings", "engine", "after"),
    [({"precision": "bf16"}, True, "0"), ({"precision": "fp32"}, True, "1"), ({"precision": "bf16"}, False, "1")],
)
def test_16_bit_attention_never_falls_back_to_whole_matrices(monkeypatch, settings, engine, after):
    monkeypatch.setenv(capability.UNFUSED_ATTENTION, "0")  # of a model that was built before
    with capability.attention_backends(PolicyConfig.model_validate(settings), engine):
        assert capability.UNFUSED_ATTENTION not in os.environ  # Megatron refuses a value that is not its own
        os.environ[capability.UNFUSED_ATTENTION] = "1"  # as Megatron does
    assert os.environ[capability.UNFUSED_ATTENTION] == after
