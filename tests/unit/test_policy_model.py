"""Megatron's settings for a model, the norm, scaled RoPE frequencies, and the virtual-pipeline settings that lie."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_nft.config import PolicyConfig
from megatron_nft.policy.family import RopeScaling, spec_from_config
from megatron_nft.policy.model import (
    RMSNorm,
    check_interleaving,
    llama3_frequencies,
    transformer_config,
    uses_transformer_engine,
)

CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 264,
}
MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
VPP = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}


def megatron(policy: dict | None = None, **config: object):
    settings = PolicyConfig(**{"precision": "fp32", **(policy or {})})
    return transformer_config(spec_from_config({**CONFIG, **config}), settings)


def test_virtual_pipelines_get_the_only_right_pair() -> None:
    config = megatron(VPP)
    assert config.overlap_p2p_comm and not config.batch_p2p_comm
    check_interleaving(config)


@pytest.mark.parametrize(("overlap", "batch"), [(False, True), (False, False), (True, True)])
def test_other_virtual_pipeline_settings_are_refused(overlap: bool, batch: bool) -> None:
    config = megatron(VPP)
    config.overlap_p2p_comm, config.batch_p2p_comm = overlap, batch
    pair = f"overlap_p2p_comm is {overlap} and batch_p2p_comm {batch}"
    with pytest.raises(ValueError, match=pair + "; .* wrong gradients"):
        check_interleaving(config)


def test_recompute_never_names_layernorm() -> None:
    """megatron-core 0.16.1 raises a NameError for it without Transformer Engine."""
    assert megatron().recompute_granularity is None
    assert megatron({"recompute": "full"}).recompute_granularity == "full"
    assert megatron({"recompute": "selective"}).recompute_modules == ["core_attn", "mlp"]
    moe = megatron({"recompute": "selective"}, model_type="qwen3_moe", norm_topk_prob=True, **MOE)
    assert moe.recompute_modules == ["core_attn", "moe"]


def test_megatron_never_divides() -> None:
    assert megatron().calculate_per_token_loss


def test_expert_weights_are_normalized_as_the_config_says() -> None:
    for normalized in (True, False):
        config = megatron(model_type="qwen3_moe", norm_topk_prob=normalized, **MOE)
        assert config.moe_router_pre_softmax is not normalized
        assert (config.num_moe_experts, config.moe_router_topk, config.moe_aux_loss_coeff) == (4, 2, 0.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without CUDA")
def test_transformer_engine_without_cuda_is_an_error() -> None:
    assert not uses_transformer_engine(PolicyConfig())
    with pytest.raises(RuntimeError, match=r"layer_spec=transformer_engine needs Transformer Engine and a GPU"):
        uses_transformer_engine(PolicyConfig(layer_spec="transformer_engine"))


def test_norm_is_the_equation_in_float64() -> None:
    config = megatron()
    norm = RMSNorm(config, 64, eps=1e-6)
    x = torch.randn(5, 64)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(64))
    exact = norm.weight.double() * x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x).double(), exact.detach(), rtol=1e-5, atol=1e-6)
    assert norm.weight.sequence_parallel is False
    parallel = megatron({"tensor_model_parallel_size": 2, "sequence_parallel": True})
    assert RMSNorm(parallel, 64).weight.sequence_parallel is True


@pytest.mark.parametrize("original", [16, 128, 8192])
def test_llama3_frequencies_are_those_of_transformers(original: int) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "original_max_position_embeddings": original, **scaling}
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, max_position_embeddings=131072, rope_parameters=rope)
    expected, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    assert attention_factor == 1.0
    plain = 1.0 / (500000.0 ** (torch.arange(0, 128, 2, dtype=torch.float32) / 128))
    got = llama3_frequencies(plain, RopeScaling(**scaling, original_max_position_embeddings=original))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert not torch.allclose(got, plain)
