"""The model, how it is laid out and computed, and its optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_nft.section import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Section

FP8_ALIGNMENT = {"none": 1, "delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32, "nvfp4": 64}
"""recipe -> what the sizes of its matrices, tokens included, must be multiples of: a block of its scales, and what
cuBLAS asks of the inner dimension."""


class ModelConfig(Section):
    """The model that is trained."""

    path: Path
    """Folder in Hugging Face format: config.json, safetensors and a tokenizer."""
    chat_template: Path | None = None
    """Jinja file used in place of the tokenizer's own chat template."""
    system_prompt: str | None = None
    """System message put before every question; None leaves it to the chat template."""
    architecture: dict[str, Any] | None = None
    """Figures of config.json, for `plan` where the folder is not at hand; checked against the folder when it is."""


class Fp8Config(Section):
    """Transformer Engine FP8, for chips that have it."""

    recipe: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8", "nvfp4"] = "none"
    """Scaling recipe: megatron-core's `fp8_recipe` (`tensorwise` is current scaling); none trains without FP8.
    mxfp8 and nvfp4 (4 bits, megatron-core's `fp4_recipe`) need Blackwell."""
    format: Literal["hybrid", "e4m3"] = "hybrid"
    """hybrid: E4M3 forward, E5M2 gradients."""
    num_layers_at_start_in_bf16: NonNegativeInt = 0
    """Transformer layers at the input end that stay in bf16."""
    num_layers_at_end_in_bf16: NonNegativeInt = 0
    """Transformer layers at the output end that stay in bf16."""
    logprobs: bool = True
    """Compute behaviour log-probs in the recipe that trains; false: in bf16. Both halves of the ratio must come from
    the same arithmetic: with false every ratio of the first update carries FP8's rounding, where it should be 1, and
    the negative term multiplies that error by r / (1 - r). False leaves it out of the gap to a bf16 engine instead."""

    @model_validator(mode="after")
    def _combinations(self) -> Fp8Config:
        layers = self.num_layers_at_start_in_bf16 + self.num_layers_at_end_in_bf16
        if layers and self.recipe in ("delayed", "nvfp4"):
            raise ValueError(
                f"fp8.recipe={self.recipe} cannot keep {layers} layers in bf16 (num_layers_at_start_in_bf16 "
                f"{self.num_layers_at_start_in_bf16}, num_layers_at_end_in_bf16 {self.num_layers_at_end_in_bf16}); "
                "allowed with these: tensorwise, blockwise, mxfp8"
            )
        if self.recipe == "nvfp4" and self.format != "hybrid":
            raise ValueError(f"fp8.format={self.format} has no meaning for recipe=nvfp4 (E2M1); leave it out")
        return self


class PolicyConfig(Section):
    """The trained model on Megatron-Core. Names are megatron-core's own."""

    tensor_model_parallel_size: PositiveInt = 1
    pipeline_model_parallel_size: PositiveInt = 1
    virtual_pipeline_model_parallel_size: PositiveInt | None = None
    """Model chunks per pipeline rank; None leaves the interleaved schedule off."""
    expert_model_parallel_size: PositiveInt = 1
    sequence_parallel: bool = False
    precision: Literal["fp32", "bf16"] = "bf16"
    """dtype of weights and activations; master weights and gradients are always fp32."""
    fp8: Fp8Config = Fp8Config()
    layer_spec: Literal["auto", "local", "transformer_engine"] = "auto"
    """auto: Transformer Engine where CUDA is there, the CPU spec else."""
    attention_backend: Literal["auto", "flash", "fused"] = "auto"
    """Transformer Engine's kernels for packed attention: FlashAttention (package flash-attn), cuDNN's, or its choice.
    `flash` beside an engine that uses FlashAttention brings the two sides' log-probs together."""
    compile: bool = True
    """With Transformer Engine layers: torch.compile for SwiGLU and for residual additions, megatron-core's fusions."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recompute; selective means the core attention and the MLP."""
    micro_batch_tokens: PositiveInt = 16384
    """Cap on the tokens of one packed micro-batch, padding included; never exceeded."""
    logprob_chunk_tokens: PositiveInt = 1024
    """Rows of [T, V] logits that exist at a time when log-probs are computed."""
    use_distributed_optimizer: bool = True
    """Shard the optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass goes on."""
    optimizer_offload: bool = False
    """Keep optimizer state in host memory."""

    @model_validator(mode="after")
    def _combinations(self) -> PolicyConfig:
        if self.virtual_pipeline_model_parallel_size is not None:
            if self.pipeline_model_parallel_size < 2:
                raise ValueError(
                    "virtual_pipeline_model_parallel_size "
                    f"({self.virtual_pipeline_model_parallel_size}) needs pipeline_model_parallel_size >= 2, "
                    f"not {self.pipeline_model_parallel_size}"
                )
            if self.virtual_pipeline_model_parallel_size < 2:
                raise ValueError("virtual_pipeline_model_parallel_size must be >= 2, or left out")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError("sequence_parallel needs tensor_model_parallel_size >= 2, not 1")
        if self.fp8.recipe != "none" and self.precision != "bf16":
            raise ValueError(f"fp8.recipe={self.fp8.recipe} needs precision=bf16, not {self.precision}")
        if self.fp8.recipe != "none" and self.layer_spec == "local":
            raise ValueError(f"fp8.recipe={self.fp8.recipe} needs layer_spec auto or transformer_engine, not local")
        if self.attention_backend != "auto" and (self.precision != "bf16" or self.layer_spec == "local"):
            raise ValueError(
                f"attention_backend={self.attention_backend} needs precision=bf16 and layer_spec auto or "
                f"transformer_engine, not {self.precision} and {self.layer_spec}"
            )
        if self.optimizer_offload and (self.precision != "bf16" or not self.use_distributed_optimizer):
            raise ValueError(
                "optimizer_offload needs precision=bf16 and use_distributed_optimizer=true, not "
                f"{self.precision} and {str(self.use_distributed_optimizer).lower()}"
            )
        return self

    @property
    def token_multiple(self) -> int:
        """Packed micro-batches are padded to a multiple of this many tokens.

        Sequence parallelism gives each tensor-parallel rank an equal share, and a share must suit the FP8 recipe.
        """
        return FP8_ALIGNMENT[self.fp8.recipe] * (self.tensor_model_parallel_size if self.sequence_parallel else 1)


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    lr: PositiveFloat = 1e-6
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Where a decaying schedule ends; unused by `constant`."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: NonNegativeInt = 10
    """Optimizer steps (not rollout batches) over which lr rises linearly; the first step already has lr/steps."""
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    adam_eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled decay of matrices; norms and biases are not decayed."""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Global gradient norm limit; 0 turns clipping off."""
