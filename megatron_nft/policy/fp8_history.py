"""Scales and the history of largest values of FP8's delayed recipe, which an exact resume needs.

Transformer Engine would give them as pickled bytes; here they are plain tensors. The other recipes keep nothing from
one micro-batch to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def fp8_history(chunks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The live tensors, fp32: "chunk.module.direction.scale" [quantizers] and ".amax_history" [length, quantizers].

    Empty for every recipe but the delayed one. Allocates the tensors that the first forward pass would allocate.
    """
    config: Any = chunks[0].config  # megatron-core's TransformerConfig
    if config.fp8 is None or config.fp8_recipe != "delayed":
        return {}
    from megatron.core.fp8_utils import get_fp8_recipe  # defined only with Transformer Engine

    recipe, found = get_fp8_recipe(config), {}
    for i, chunk in enumerate(chunks):
        for name, module in chunk.named_modules():
            if not hasattr(module, "fuse_wgrad_accumulation"):
                continue  # not one of Transformer Engine's linears
            module.fp8_meta.setdefault("num_gemms", getattr(module, "num_gemms", 1))
            module.init_fp8_meta_tensors(recipe)  # leaves what is there
            for direction in ("scaling_fwd", "scaling_bwd"):
                state = module.fp8_meta[direction]
                found[f"{i}.{name}.{direction}.scale"] = state.scale
                found[f"{i}.{name}.{direction}.amax_history"] = state.amax_history
    return found
