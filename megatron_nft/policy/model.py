"""Builds Megatron's GPTModel for a ModelSpec: one chunk per virtual pipeline stage.

`PolicyModel` differs from GPTModel in two ways. Its last stage returns hidden states in place of logits, because
log-probs are computed from hidden states and the output weight in chunks (policy/logprobs.py). And on a CPU its RoPE
frequencies are taken per token from `position_ids`, which is what packed segments mean.

Weights are NaN until they are loaded, so a tensor that a loader forgot shows at once.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as ps
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_nft.config import PolicyConfig
from megatron_nft.policy import cpu
from megatron_nft.policy.attention import PackedAttention, SegmentParams, segment_params
from megatron_nft.policy.batch_invariant import check_model, use_batch_invariant_kernels
from megatron_nft.policy.capability import attention_backends, check_gpu_stack, check_without_gpu, read_gpu_stack
from megatron_nft.policy.context_parallel import UNSPLIT, TokenSplit
from megatron_nft.policy.family import ModelSpec, RopeScaling, check_layout
from megatron_nft.policy.parallel import ParallelLayout
from megatron_nft.policy.precision import check_sizes, transformer_fields
from megatron_nft.policy.user_buffers import open_user_buffers
from megatron_nft.types import PackedBatch


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), in fp32 inside. Megatron's torch norm refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron sums the gradients of parameters with this mark over TP ranks
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron's own mark

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H], same dtype."""
        x_f32 = x.float()
        return self.weight * (x_f32 * torch.rsqrt(x_f32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class PolicyModel(GPTModel):  # type: ignore[misc]  # megatron-core has no types
    """GPTModel whose last stage returns hidden states [T, 1, H] ([T / tp, 1, H] under sequence parallelism); under
    context parallelism T are this rank's tokens of the micro-batch."""

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, **kwargs: Any) -> tuple[Any, ...]:
        decoder_input, rotary, *rest = super()._preprocess(input_ids, position_ids, **kwargs)
        if isinstance(kwargs.get("packed_seq_params"), SegmentParams):
            rotary = rotary[position_ids[0]]  # [max_seqlen, 1, 1, D] -> [T, 1, 1, D]
        return decoder_input, rotary, *rest

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states

    @property
    def output_weight(self) -> nn.Parameter:
        """[V / tp, H] of the last stage: the output layer's, or the embedding's where they are tied."""
        shared = self.share_embeddings_and_output_weights
        weight: nn.Parameter = self.shared_embedding_or_output_weight() if shared else self.output_layer.weight
        return weight


def unwrap(chunk: nn.Module) -> PolicyModel:
    """Return the model inside Megatron's wrappers, DistributedDataParallel for one."""
    while isinstance(inner := getattr(chunk, "module", None), nn.Module):
        chunk = inner
    assert isinstance(chunk, PolicyModel)
    return chunk


def uses_transformer_engine(policy: PolicyConfig) -> bool:
    """Whether the layers are Transformer Engine's. RuntimeError where it is asked for and missing."""
    cuda = torch.cuda.is_available()
    if policy.layer_spec == "local" or (policy.layer_spec == "auto" and not cuda):
        return False
    if importlib.util.find_spec("transformer_engine") is None or not cuda:
        raise RuntimeError(
            f"policy.layer_spec={policy.layer_spec} needs Transformer Engine and a GPU (CUDA is "
            f"{'there' if cuda else 'not there'}); install the extra `te`, or set policy.layer_spec=local"
        )
    return True


def transformer_config(spec: ModelSpec, policy: PolicyConfig) -> TransformerConfig:
    """Megatron's settings for this model, layout and precision."""
    engine = uses_transformer_engine(policy)
    dtype = torch.float32 if policy.precision == "fp32" else torch.bfloat16
    interleaved = policy.virtual_pipeline_model_parallel_size is not None
    return TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.num_attention_heads,
        num_query_groups=spec.num_query_groups,
        kv_channels=spec.kv_channels,
        ffn_hidden_size=spec.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=spec.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=spec.add_qkv_bias,
        qk_layernorm=spec.qk_layernorm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=policy.tensor_model_parallel_size,
        pipeline_model_parallel_size=policy.pipeline_model_parallel_size,
        # without Transformer Engine attention alone knows of it, from SegmentParams
        context_parallel_size=policy.context_parallel_size if engine else 1,
        virtual_pipeline_model_parallel_size=policy.virtual_pipeline_model_parallel_size,
        sequence_parallel=policy.sequence_parallel,
        tp_comm_overlap=policy.tp_comm_overlap,
        variable_seq_lengths=policy.pipeline_model_parallel_size > 1,
        # with any other pair 0.16.1 computes wrong gradients in the interleaved schedule, without an error
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=not torch.cuda.is_available(),
        # Megatron marks a parameter as split over TP ranks only while it initializes it; without the mark the gradient
        # norm counts the parameter of TP rank 0 alone
        perform_initialization=True,
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        attention_softmax_in_fp32=True,
        attention_backend=AttnBackend[policy.attention_kernels],  # read by Transformer Engine alone
        batch_invariant_mode=policy.batch_invariant,
        calculate_per_token_loss=True,  # Megatron then sums and never divides; policy/step.py does
        bias_activation_fusion=engine and policy.compile,
        bias_dropout_fusion=engine and policy.compile,
        apply_rope_fusion=engine,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,  # see _fuse_gradient_accumulation
        **_recompute(spec, policy),
        **_experts(spec, policy, engine),
        **transformer_fields(policy.fp8),
    )


def _leave(weight: Tensor) -> Tensor:
    """Do nothing in place of an initialization: every weight is loaded."""
    return weight


def _recompute(spec: ModelSpec, policy: PolicyConfig) -> dict[str, Any]:
    if policy.recompute == "none":
        return {}
    if policy.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "moe" if spec.num_experts else "mlp"],
    }


def _experts(spec: ModelSpec, policy: PolicyConfig, engine: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {"moe_token_dispatcher_type": "alltoall"}  # 0.16.1 wants it for variable_seq_lengths
    if spec.num_experts:
        settings |= {
            "num_moe_experts": spec.num_experts,
            "moe_ffn_hidden_size": spec.moe_ffn_hidden_size,
            "moe_router_topk": spec.num_experts_per_token,
            "moe_router_pre_softmax": not spec.normalize_expert_weights,
            "moe_router_load_balancing_type": "none",
            "moe_router_dtype": "fp32",
            "moe_aux_loss_coeff": 0.0,
            "moe_grouped_gemm": engine,
            "expert_model_parallel_size": policy.expert_model_parallel_size,
            "expert_tensor_parallel_size": 1 if policy.expert_model_parallel_size > 1 else None,
        }
    return settings


def check_interleaving(config: TransformerConfig) -> None:
    """ValueError for the virtual-pipeline settings under which megatron-core 0.16.1 is silently wrong."""
    if config.virtual_pipeline_model_parallel_size is None:
        return
    if not config.overlap_p2p_comm or config.batch_p2p_comm:
        raise ValueError(
            f"overlap_p2p_comm is {config.overlap_p2p_comm} and batch_p2p_comm {config.batch_p2p_comm}; "
            "virtual pipeline parallelism allows only True and False: other pairs give wrong gradients"
        )


def layer_spec(
    config: TransformerConfig, engine: bool, vp_stage: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    """Transformer Engine's layers, or Megatron's local ones with our norm and packed attention."""
    if engine:
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=RMSNorm)


def build_chunks(spec: ModelSpec, policy: PolicyConfig, layout: ParallelLayout) -> list[PolicyModel]:
    """This rank's model chunks, on its device, weights NaN until loaded."""
    check_layout(spec, policy)
    check_sizes(spec, policy)
    engine = uses_transformer_engine(policy)
    if engine:
        check_gpu_stack(policy, read_gpu_stack(layout.device))
    else:
        check_without_gpu(policy)
    config = transformer_config(spec, policy)
    check_interleaving(config)
    if policy.batch_invariant:
        check_model(spec)
    use_batch_invariant_kernels(policy.batch_invariant)
    if policy.tp_comm_overlap:
        open_user_buffers(spec, policy, layout)
    with cpu.on_cpu(), attention_backends(policy, engine):
        chunks = [_build(spec, config, engine, stage) for stage in range(layout.vpp_size or 1)]
    for chunk in chunks:
        chunk.to(layout.device)
        if not policy.batch_invariant:  # its products would overwrite what they should add to
            _fuse_gradient_accumulation(chunk)
        with torch.no_grad():
            for parameter in chunk.parameters():
                parameter.fill_(math.nan)
    return chunks


def _fuse_gradient_accumulation(chunk: PolicyModel) -> None:
    """Let Transformer Engine's linears add weight gradients to DDP's fp32 buffer inside the matrix product.

    Megatron's own switch for it refuses to build the output layer without NVIDIA apex, although Transformer Engine
    needs no apex; the output layer's gradient comes from policy/logprobs.py either way.
    """
    for module in chunk.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def _build(spec: ModelSpec, config: TransformerConfig, engine: bool, stage: int) -> PolicyModel:
    vp_stage = stage if config.virtual_pipeline_model_parallel_size else None
    model = PolicyModel(
        config,
        layer_spec(config, engine, vp_stage),
        vocab_size=spec.padded_vocab_size(config.tensor_model_parallel_size),
        max_sequence_length=spec.max_position_embeddings,
        pg_collection=_groups(engine),
        pre_process=ps.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=ps.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        parallel_output=True,
        share_embeddings_and_output_weights=spec.tied,
        position_embedding_type="rope",
        rotary_base=spec.rope_theta,
        vp_stage=vp_stage,
    )
    if spec.rope_scaling is not None:
        rotary = model.rotary_pos_emb
        rotary.inv_freq = llama3_frequencies(rotary.inv_freq, spec.rope_scaling)
    return model


class _OneRank:
    """Stands in for a context-parallel group where Megatron asks only for rank and size."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def _groups(engine: bool) -> ProcessGroupCollection:
    """Megatron's process groups. On a CPU `_preprocess` gives RoPE the frequencies of this rank's own tokens, which it
    must not divide over ranks once more."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if not engine:
        groups.cp = _OneRank()
    return groups


def llama3_frequencies(inv_freq: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3's RoPE scaling, fp32 [D / 2] -> [D / 2]. Megatron's own fixes the last three values.

    Wavelengths above original / low_freq_factor are stretched by `factor`, those below original / high_freq_factor are
    kept, and between the two the frequency is interpolated (Llama 3.1 reference, apply_scaling).
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)  # over the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: stretched, 1: kept
    return inv_freq * (kept + (1 - kept) / scaling.factor)


def packed_params(batch: PackedBatch, engine: bool, split: TokenSplit = UNSPLIT) -> PackedSeqParams:
    """Megatron's description of the segments of `batch`, for either layer spec. They are those of the whole micro-batch
    also where this rank has a part of it."""
    if not engine:
        return segment_params(batch.cu_seqlens, batch.max_seqlen, split)
    # Transformer Engine's context-parallel attention wants the padded bounds too, equal or not
    padded = {} if split.by_rank is None else {f"cu_seqlens_{side}_padded": batch.cu_seqlens for side in ("q", "kv")}
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
        **padded,
    )
