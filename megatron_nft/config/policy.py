"""The model, how it is laid out and computed, and its optimizer."""

from __future__ import annotations

import math
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
    """Jinja file to use in place of the tokenizer's own chat template."""
    system_prompt: str | None = None
    """System message put before every question; null leaves it to the chat template."""
    architecture: dict[str, Any] | None = None
    """Values of the model's config.json, so that `megatron-nft plan` works where the folder is not at hand. They are
    checked against the folder where it is."""


class Fp8Config(Section):
    """Transformer Engine FP8, for chips that have it."""

    recipe: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8", "nvfp4"] = "none"
    """Scaling recipe, megatron-core's `fp8_recipe` (`tensorwise` is current scaling); none trains without FP8.
    mxfp8 and nvfp4 (4 bits, megatron-core's `fp4_recipe`) need Blackwell."""
    format: Literal["hybrid", "e4m3"] = "hybrid"
    """Number format: hybrid is E4M3 forward and E5M2 for gradients, e4m3 is E4M3 for both."""
    num_layers_at_start_in_bf16: NonNegativeInt = 0
    """Number of transformer layers at the input end that stay in bf16."""
    num_layers_at_end_in_bf16: NonNegativeInt = 0
    """Number of transformer layers at the output end that stay in bf16."""
    logprobs: bool = True
    """Compute behaviour log-probs in the recipe that trains; false computes them in bf16. Both halves of the ratio
    should come from the same arithmetic: with false every ratio of the first update carries FP8's rounding, where it
    should be 1, and the negative term multiplies that error by r / (1 - r). In return, false keeps FP8's rounding out
    of the measured gap to a bf16 engine."""

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
    """Ranks that each matrix is split over (TP). Times `context_parallel_size` and `pipeline_model_parallel_size` it
    must divide the number of ranks; what remains is data parallel."""
    context_parallel_size: PositiveInt = 1
    """Ranks that the tokens of each answer are split over (CP), for answers whose activations do not fit one rank. Each
    has 1 / CP of every micro-batch, in which answers are padded to a multiple of 2 CP tokens. Transformer Engine layers
    need precision=bf16 for it."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Stages that the layers are split into (PP)."""
    virtual_pipeline_model_parallel_size: PositiveInt | None = None
    """Model chunks per pipeline rank (VPP), at least 2; null leaves the interleaved schedule off."""
    expert_model_parallel_size: PositiveInt = 1
    """Ranks that the experts of a mixture-of-experts model are spread over (EP); must divide data x context x tensor
    parallel size."""
    sequence_parallel: bool = False
    """Split the activations between the matrices along the sequence as well; needs TP of at least 2."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """dtype of weights and activations. Master weights and gradients are always fp32."""
    fp8: Fp8Config = Fp8Config()
    """Transformer Engine FP8, for chips that have it."""
    layer_spec: Literal["auto", "local", "transformer_engine"] = "auto"
    """Implementation of the layers: Transformer Engine's, or megatron-core's own in plain torch (`local`), which a CPU
    needs. auto takes Transformer Engine where there is a CUDA device."""
    attention_backend: Literal["auto", "flash", "fused"] = "auto"
    """Transformer Engine's kernels for packed attention: FlashAttention (package flash-attn), cuDNN's fused attention,
    or its own choice. `flash` beside an engine that uses FlashAttention brings the two sides' log-probs closer."""
    batch_invariant: bool = False
    """Kernels whose result for a token does not depend on what is computed beside it, on both sides: megatron-core's in
    the trainer, and those of servers, since it sets rollout.server.deterministic (start servers of your own with it).
    Brings log-probs of trainer and engine together. Slower. Needs GPUs, bf16, a dense model, no FP8, and Transformer
    Engine with the package flash-attn."""
    compile: bool = True
    """Compile SwiGLU and the residual additions (megatron-core's fusions) with torch.compile. Acts on Transformer
    Engine layers only."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that are computed again in the backward pass rather than kept: none, core attention and MLP
    (selective), or whole layers (full). Saves memory, costs time."""
    micro_batch_tokens: PositiveInt = 16384
    """Most tokens in one packed micro-batch, padding included, over all its context-parallel ranks. Must hold the
    longest answer with its prompt; lower it where activations do not fit."""
    logprob_chunk_tokens: PositiveInt = 1024
    """Tokens whose logits over the whole vocabulary exist at a time while log-probs are computed."""
    lm_head: Literal["auto", "one_pass", "two_pass"] = "auto"
    """How output layer and loss are trained. two_pass makes the logits in the forward pass and again in the backward
    pass; one_pass makes them once and forms both gradients at once, three products in place of four, for losses that
    are per token. auto is one_pass where that was measured to be faster, which so far is a CPU, and two_pass for other
    losses and with context parallelism."""
    use_distributed_optimizer: bool = True
    """Shard the optimizer's state over the data- and context-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over the data- and context-parallel ranks while the backward pass goes on."""
    overlap_param_gather: bool = False
    """Gather the updated weights over the data- and context-parallel ranks while the forward pass of the next update
    goes on. Needs use_distributed_optimizer, which divides the update, and overlap_grad_reduce, without which Megatron
    has a single bucket and nothing to overlap."""
    tp_comm_overlap: bool = False
    """Move the activations of sequence parallelism through Transformer Engine's user buffers while it multiplies. Needs
    sequence_parallel, bf16, Transformer Engine and each tensor-parallel group on one host. The buffers have one size:
    every micro-batch is padded to micro_batch_tokens."""
    cuda_device_max_connections: PositiveInt | None = None
    """CUDA_DEVICE_MAX_CONNECTIONS of the ranks. null: 1 with TP or CP of at least 2 on chips before Blackwell, where
    Megatron's overlap relies on kernels starting in order and another value is refused; else what the environment
    has."""
    optimizer_offload: bool = False
    """Keep the optimizer's state in host memory. Needs bf16, the distributed optimizer and Transformer Engine."""

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
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise ValueError(
                "overlap_param_gather needs use_distributed_optimizer=true and overlap_grad_reduce=true, not "
                f"{str(self.use_distributed_optimizer).lower()} and {str(self.overlap_grad_reduce).lower()}"
            )
        if self.tp_comm_overlap:
            self._check_user_buffers()
        if self.batch_invariant:
            self._check_batch_invariant()
        if self.optimizer_offload and (self.precision != "bf16" or not self.use_distributed_optimizer):
            raise ValueError(
                "optimizer_offload needs precision=bf16 and use_distributed_optimizer=true, not "
                f"{self.precision} and {str(self.use_distributed_optimizer).lower()}"
            )
        return self

    def _check_batch_invariant(self) -> None:
        """ValueError where megatron-core's batch-invariant kernels cannot be used."""
        wrong = {
            "precision": self.precision != "bf16",
            "layer_spec": self.layer_spec == "local",
            "attention_backend": self.attention_backend == "fused",
            "fp8.recipe": self.fp8.recipe != "none",
            "tp_comm_overlap": self.tp_comm_overlap,
        }
        values = self.model_dump() | {"fp8.recipe": self.fp8.recipe}
        if given := [f"{name}={values[name]}" for name, is_wrong in wrong.items() if is_wrong]:
            raise ValueError(
                "batch_invariant=true needs precision=bf16, layer_spec auto or transformer_engine, attention_backend "
                f"auto or flash, fp8.recipe=none and tp_comm_overlap=false, not {', '.join(given)}"
            )

    @property
    def attention_kernels(self) -> str:
        """`attention_backend` as it is used: FlashAttention alone has batch-invariant kernels."""
        return "flash" if self.batch_invariant else self.attention_backend

    def _check_user_buffers(self) -> None:
        """ValueError where Transformer Engine's user buffers cannot be used."""
        if not self.sequence_parallel or self.precision != "bf16" or self.layer_spec == "local":
            raise ValueError(
                "tp_comm_overlap needs sequence_parallel=true, precision=bf16 and layer_spec auto or "
                f"transformer_engine, not {str(self.sequence_parallel).lower()}, {self.precision} and {self.layer_spec}"
            )
        if self.context_parallel_size > 1:
            raise ValueError(
                "tp_comm_overlap: the buffers have the size of a whole micro-batch, which context_parallel_size="
                f"{self.context_parallel_size} divides; use one of the two"
            )
        if self.fp8.recipe not in ("none", "delayed", "tensorwise", "mxfp8"):
            raise ValueError(
                f"tp_comm_overlap: Transformer Engine 2.11 has no user buffers for fp8.recipe={self.fp8.recipe}; "
                "allowed are none, delayed, tensorwise and mxfp8"
            )
        share = FP8_ALIGNMENT[self.fp8.recipe] * self.tensor_model_parallel_size
        if self.micro_batch_tokens % share:
            raise ValueError(
                f"tp_comm_overlap: micro_batch_tokens ({self.micro_batch_tokens}) is the size of every micro-batch and "
                f"must be a multiple of {share}, for tensor_model_parallel_size {self.tensor_model_parallel_size} and "
                f"fp8.recipe={self.fp8.recipe}"
            )

    def check_average(self) -> None:
        """ValueError where no moving average of the weights can be kept (algorithm.reference=ema)."""
        if self.fp8.recipe != "none":
            raise ValueError(
                f"algorithm.reference=ema does not go with policy.fp8.recipe={self.fp8.recipe}: a pass with the "
                "average would change the scales of the trained weights; use fp8.recipe=none"
            )
        if self.optimizer_offload:
            raise ValueError(
                "algorithm.reference=ema does not go with policy.optimizer_offload=true: the average is kept beside "
                "the optimizer's masters, which are on the host then; use optimizer_offload=false"
            )

    def data_parallel_size(self, world_size: int) -> int:
        """Number of replicas that `world_size` processes make: world_size / (TP x CP x PP).

        ValueError where TP x CP x PP does not divide the processes, or EP does not divide those of a pipeline stage.
        """
        sizes = {
            "tensor_model_parallel_size": self.tensor_model_parallel_size,
            "context_parallel_size": self.context_parallel_size,
            "pipeline_model_parallel_size": self.pipeline_model_parallel_size,
        }
        replica = math.prod(sizes.values())
        if world_size < 1 or world_size % replica:
            factors = " x ".join(f"{name} ({size})" for name, size in sizes.items())
            raise ValueError(
                f"{world_size} processes cannot be divided into {factors} = {replica}; use a multiple of {replica} "
                "processes (num_processes, or the GPUs of the job)"
            )
        stage, ep = world_size // self.pipeline_model_parallel_size, self.expert_model_parallel_size
        if stage % ep:
            raise ValueError(
                f"expert_model_parallel_size ({ep}) must divide data x context x tensor parallel size ({stage})"
            )
        return world_size // replica

    @property
    def segment_multiple(self) -> int:
        """Every answer of a packed micro-batch is padded to a multiple of this many tokens: context parallelism cuts it
        into two equal chunks per rank."""
        return 2 * self.context_parallel_size if self.context_parallel_size > 1 else 1

    @property
    def token_multiple(self) -> int:
        """Packed micro-batches are padded to a multiple of this many tokens, itself one of `segment_multiple`.

        Context parallelism and sequence parallelism give each rank an equal share, which must suit the FP8 recipe. User
        buffers have one size.
        """
        if self.tp_comm_overlap:
            return self.micro_batch_tokens
        share = FP8_ALIGNMENT[self.fp8.recipe] * (self.tensor_model_parallel_size if self.sequence_parallel else 1)
        return math.lcm(self.segment_multiple, share * self.context_parallel_size)


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    lr: PositiveFloat = 1e-6
    """Learning rate after the warm-up."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at which a decaying schedule ends; not used by `constant`."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule after the warm-up, over all optimizer updates of the run."""
    lr_warmup_steps: NonNegativeInt = 10
    """Optimizer updates (not training steps) over which the learning rate rises linearly; the first update already has
    lr / lr_warmup_steps."""
    adam_beta1: Fraction = 0.9
    """Decay of the running mean of gradients."""
    adam_beta2: Fraction = 0.999
    """Decay of the running mean of squared gradients."""
    adam_eps: PositiveFloat = 1e-8
    """Added to the denominator of the update."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay of matrices; norms and biases are not decayed."""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the whole gradient; above it the gradient is scaled down. 0 turns clipping off."""
