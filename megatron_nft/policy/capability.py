"""Requirements of the GPU path on the chip, CUDA, cuDNN and Transformer Engine, checked before a model is built.

Sources: Transformer Engine 2.11 (`quantization.py`: check_fp8_support and its neighbours; `fused_attn.cpp`: packed
layouts) and megatron-core 0.16.1, which asks for Transformer Engine 2.9 or newer.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from packaging.version import Version

from megatron_nft.config import FP8_ALIGNMENT, PolicyConfig
from megatron_nft.policy.cudnn import cudnn_versions, fits_torch
from megatron_nft.policy.stack import MIN_TRANSFORMER_ENGINE

Capability = tuple[int, int]

SPLITS_SINCE = "2.10"
UNFUSED_ATTENTION = "NVTE_UNFUSED_ATTN"  # read by Transformer Engine when it chooses an attention backend
MIN_CUDNN = (9, 6)  # packed (thd) attention with grouped queries, on compute capability 9.0 and above


@dataclass(frozen=True)
class GpuStack:
    """The hardware and software of a rank's GPU."""

    chip: str  # as the driver names it
    capability: Capability
    cuda: tuple[int, ...]  # the version that torch was built for
    cudnn: tuple[int, ...]  # that is loaded
    transformer_engine: str
    flash_attention: bool  # the package flash-attn (2 or 3) is installed
    built_for_cudnn: tuple[int, ...] = ()  # the version of torch's build; () where that says nothing


@dataclass(frozen=True)
class _Needs:
    """The requirements of one FP8 recipe."""

    capability: Capability
    below: Capability | None = None  # first capability without it
    cuda: tuple[int, ...] = (12, 1)


NEEDS = {
    "delayed": _Needs((8, 9)),
    "tensorwise": _Needs((8, 9)),
    "blockwise": _Needs((9, 0), cuda=(12, 9)),
    "mxfp8": _Needs((10, 0), below=(12, 0)),
    "nvfp4": _Needs((10, 0)),
}


def read_gpu_stack(device: torch.device | int | None = None) -> GpuStack:
    """Read the stack of `device`, by default of the current one. Needs CUDA and Transformer Engine."""
    built, loaded = cudnn_versions()
    return GpuStack(
        chip=torch.cuda.get_device_name(device),
        capability=torch.cuda.get_device_capability(device),
        cuda=_numbers(torch.version.cuda or "0"),
        cudnn=loaded,
        built_for_cudnn=built,
        transformer_engine=importlib.metadata.version("transformer-engine"),
        flash_attention=any(importlib.util.find_spec(n) is not None for n in ("flash_attn", "flash_attn_3")),
    )


def recipe_problem(recipe: str, stack: GpuStack) -> str | None:
    """Why the recipe cannot run on this stack, or None if it can."""
    if recipe == "none":
        return None
    needs, has = NEEDS[recipe], stack.capability
    if has < needs.capability or (needs.below and has >= needs.below):
        wanted = f"{_dotted(needs.capability)} or above" + (f", below {_dotted(needs.below)}" if needs.below else "")
        return f"needs compute capability {wanted}; {stack.chip} has {_dotted(has)}"
    if stack.cuda < needs.cuda:
        return f"needs CUDA {_dotted(needs.cuda)} or newer; torch was built for {_dotted(stack.cuda)}"
    return None


def allowed_recipes(stack: GpuStack) -> list[str]:
    """The values of `policy.fp8.recipe` that this stack can run."""
    return [recipe for recipe in FP8_ALIGNMENT if recipe_problem(recipe, stack) is None]


def check_gpu_stack(policy: PolicyConfig, stack: GpuStack) -> None:
    """ValueError where Transformer Engine layers cannot run as set. It says what is installed and what to do."""
    if Version(stack.transformer_engine) < Version(MIN_TRANSFORMER_ENGINE):
        raise ValueError(
            f"Transformer Engine {stack.transformer_engine} is installed; megatron-core 0.16.1 needs "
            f"{MIN_TRANSFORMER_ENGINE} or newer: install the extra `te`, or set policy.layer_spec=local"
        )
    if not fits_torch(stack.built_for_cudnn, stack.cudnn):
        raise ValueError(
            f"cuDNN {_dotted(stack.cudnn)} is loaded, torch was built for {_dotted(stack.built_for_cudnn)}: take the "
            "other one out of LD_LIBRARY_PATH and LD_PRELOAD, or install torch's own (pip install the nvidia-cudnn "
            "package that torch requires)"
        )
    problem = recipe_problem(policy.fp8.recipe, stack)
    if problem:
        raise ValueError(
            f"policy.fp8.recipe={policy.fp8.recipe} {problem}. Allowed here: {', '.join(allowed_recipes(stack))}"
        )
    if policy.context_parallel_size > 1 and policy.precision != "bf16":
        raise ValueError(
            f"policy.context_parallel_size={policy.context_parallel_size} with policy.precision={policy.precision}: "
            "Transformer Engine has context-parallel attention in 16 bits alone; set precision=bf16, "
            "context_parallel_size=1 or layer_spec=local"
        )
    fused = stack.capability >= (9, 0) and stack.cudnn >= MIN_CUDNN
    if policy.precision == "bf16" and not (fused or stack.flash_attention):
        raise ValueError(
            f"packed attention needs cuDNN {_dotted(MIN_CUDNN)} or newer on compute capability 9.0 or above, or the "
            f"package flash-attn; here are cuDNN {_dotted(stack.cudnn)}, {stack.chip} with "
            f"{_dotted(stack.capability)} and no flash-attn. Without them Transformer Engine would build whole "
            "[tokens, tokens] matrices: install flash-attn, or set policy.layer_spec=local"
        )
    if policy.batch_invariant and not stack.flash_attention:
        raise ValueError(
            "policy.batch_invariant=true needs the package flash-attn, which is not installed: megatron-core has no "
            "other batch-invariant attention"
        )
    if policy.batch_invariant and Version(stack.transformer_engine) < Version(SPLITS_SINCE):
        raise ValueError(
            f"policy.batch_invariant=true needs Transformer Engine {SPLITS_SINCE} or newer, which can keep "
            f"FlashAttention from splitting keys; {stack.transformer_engine} is installed"
        )
    if policy.attention_backend == "flash" and not stack.flash_attention:
        raise ValueError(
            "policy.attention_backend=flash needs the package flash-attn, which is not installed. Allowed here: auto, "
            "fused"
        )
    if policy.attention_backend == "fused" and not fused:
        raise ValueError(
            f"policy.attention_backend=fused needs cuDNN {_dotted(MIN_CUDNN)} or newer on compute capability 9.0 or "
            f"above; here are cuDNN {_dotted(stack.cudnn)} and {stack.chip} with {_dotted(stack.capability)}. "
            "Allowed here: auto, flash"
        )


def check_without_gpu(policy: PolicyConfig) -> None:
    """ValueError for settings of Transformer Engine's that have no meaning on a machine without CUDA."""
    for name in ("tp_comm_overlap", "batch_invariant"):
        if getattr(policy, name):
            raise ValueError(
                f"policy.{name}=true needs Transformer Engine on GPUs, and no CUDA device is here: leave it out"
            )


@contextmanager
def attention_backends(policy: PolicyConfig, engine: bool) -> Iterator[None]:
    """Context in which the model is built. Afterwards Transformer Engine raises where neither cuDNN nor FlashAttention
    can handle a packed batch in 16 bits (because of an unsupported head size, for example), rather than fall back to
    whole [tokens, tokens] matrices.

    Megatron sets the variable itself while it builds the model, and refuses a value that is not its own.
    """
    os.environ.pop(UNFUSED_ATTENTION, None)
    yield
    if engine and policy.precision == "bf16":
        os.environ[UNFUSED_ATTENTION] = "0"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
