"""config.json of every family read exactly, in its old and new form; anything that is not honoured is refused."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from megatron_nft.config import PolicyConfig
from megatron_nft.policy.families import FAMILIES, Family
from megatron_nft.policy.family import ModelSpec, RopeScaling, check_layout, read_family, spec_from_config

# As published by their authors (config.json of the hub, transformers 4 form).
QWEN25_MATH_7B = {
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 4096,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
LLAMA31_8B = {
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_qwen25() -> None:
    spec = spec_from_config(QWEN25_MATH_7B)
    assert (spec.family, spec.num_layers, spec.hidden_size, spec.ffn_hidden_size) == ("qwen2", 28, 3584, 18944)
    assert (spec.num_attention_heads, spec.num_query_groups, spec.kv_channels) == (28, 4, 128)
    assert spec.add_qkv_bias and not spec.qk_layernorm and not spec.tied
    assert (spec.rope_theta, spec.rope_scaling, spec.norm_epsilon) == (10000.0, None, 1e-6)
    assert (spec.vocab_size, spec.num_experts) == (152064, 0)


def test_llama_with_scaled_rope() -> None:
    spec = spec_from_config(LLAMA31_8B)
    assert not spec.add_qkv_bias and not spec.qk_layernorm
    assert spec.rope_theta == 500000.0 and spec.norm_epsilon == 1e-5
    assert spec.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


def test_qwen3_moe() -> None:
    spec = spec_from_config(QWEN3_30B_A3B)
    assert spec.qk_layernorm and not spec.add_qkv_bias and spec.kv_channels == 128
    assert (spec.num_experts, spec.moe_ffn_hidden_size, spec.num_experts_per_token) == (128, 768, 8)
    assert spec.normalize_expert_weights


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_record_says_what_its_parameters_say(family: Family) -> None:
    megatron_names = {name.removeprefix("decoder.layers.{layer}.") for row in family.layer for name in row.megatron}
    assert ("self_attention.linear_qkv.bias" in megatron_names) == family.attention_bias
    assert ("self_attention.q_layernorm.weight" in megatron_names) == family.qk_norm
    assert ("mlp.router.weight" in megatron_names) == (family.experts is not None)
    assert any(row.expert for row in family.layer) == (family.experts is not None)
    assert FAMILIES[family.name] is family


@pytest.mark.parametrize("published", [QWEN25_MATH_7B, LLAMA31_8B, QWEN3_30B_A3B], ids=lambda c: c["model_type"])
def test_both_forms_of_config_json_mean_the_same(published: dict) -> None:
    """transformers 5 writes rope_parameters where 4 wrote rope_theta and rope_scaling."""
    rewritten = AutoConfig.for_model(**published).to_dict()
    assert "rope_parameters" in rewritten and "rope_theta" not in rewritten
    assert spec_from_config(json.loads(json.dumps(rewritten))) == spec_from_config(published)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, r"model_type is 'mistral'; allowed: llama, qwen2, qwen3, qwen3_moe"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; allowed: 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window is True; allowed: False"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types holds sliding_attention"),
        ({"attention_bias": False}, "attention_bias is False; allowed for qwen2: True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, r"rope_scaling.rope_type is 'yarn'; allowed"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "is 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks the number.s. low_freq_factor"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, r"rope_parameters.rope_type is 'dynamic'"),
        ({"rope_theta": "big"}, "rope_theta is 'big'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a positive whole number"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"num_attention_heads": 27}, r"num_attention_heads \(27\) must divide hidden_size \(3584\)"),
    ],
)
def test_what_is_not_honoured_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec_from_config({**QWEN25_MATH_7B, **change})


@pytest.mark.parametrize("change", [{"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}, {"attention_bias": True}])
def test_moe_variants_are_refused(change: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        spec_from_config({**QWEN3_30B_A3B, **change})


def test_folder_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        read_family(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        read_family(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"config\.json: model_type is 'bert'"):
        read_family(tmp_path)


def test_the_vocabulary_is_padded_to_the_tensor_parallel_size() -> None:
    spec = spec_from_config({**QWEN25_MATH_7B, "vocab_size": 263})
    assert [spec.padded_vocab_size(tp) for tp in (1, 2, 4, 8)] == [263, 264, 264, 264]
    check_layout(spec, PolicyConfig(tensor_model_parallel_size=2))
    assert spec.padding_note(1) is None
    said = spec.padding_note(4)
    assert "(4) does not divide the model's vocab_size (263); padded to 264 rows, of which the last 1 never" in said


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"tensor_model_parallel_size": 3}, r"\(3\) must divide the model's num_attention_heads \(28\).*: 1, 2, 4$"),
        ({"tensor_model_parallel_size": 7}, r"\(7\) must divide the model's num_key_value_heads \(4\)"),
        ({"pipeline_model_parallel_size": 3}, r"pipeline_model_parallel_size \(3\) must divide .* \(28\)"),
        (
            {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2},
            r"\(4\) x virtual_pipeline_model_parallel_size \(2\) = 8 must divide .* \(28\)",
        ),
        ({"expert_model_parallel_size": 2}, r"\(2\) must be 1: qwen2 has no experts"),
    ],
)
def test_layouts_that_do_not_divide_the_model(policy: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_layout(spec_from_config(QWEN25_MATH_7B), PolicyConfig(**policy))


def test_experts_must_divide() -> None:
    with pytest.raises(ValueError, match=r"\(3\) must divide the model's num_experts \(128\)"):
        check_layout(spec_from_config(QWEN3_30B_A3B), PolicyConfig(expert_model_parallel_size=3))


def test_the_flat_form_is_that_of_earlier_checkpoints():
    """Manifests hold it; written down from one of version 0.1.0."""
    config = {
        "model_type": "qwen3_moe", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99, "max_position_embeddings": 128,
        "num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "norm_topk_prob": True,
    }  # fmt: skip
    flat = {
        "family": "qwen3_moe", "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2,
        "kv_channels": 16, "ffn_hidden_size": 96, "vocab_size": 99, "tied": False, "norm_epsilon": 1e-06,
        "rope_theta": 10000.0, "rope_scaling": None, "max_position_embeddings": 128, "add_qkv_bias": False,
        "qk_layernorm": True, "num_experts": 4, "moe_ffn_hidden_size": 32, "num_experts_per_token": 2,
        "normalize_expert_weights": True,
    }  # fmt: skip
    spec = spec_from_config(config)
    assert spec.to_dict() == flat
    assert ModelSpec.from_dict(flat) == spec


def test_a_dense_model_has_no_experts_in_the_flat_form():
    config = {"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}  # fmt: skip
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"), 8)
    spec = spec_from_config(config | sizes | {"num_hidden_layers": 1, "max_position_embeddings": 9})
    flat = spec.to_dict()
    assert (flat["num_experts"], flat["moe_ffn_hidden_size"], flat["normalize_expert_weights"]) == (0, 0, True)
    assert flat["rope_scaling"]["factor"] == 8.0
    assert ModelSpec.from_dict(flat) == spec
