"""megatron-core's batch-invariant kernels, and what of ours has to change beside them (`policy.batch_invariant`).

cuBLAS chooses an algorithm, and with it an order of summation, by the number of tokens. megatron-core 0.16.1
(transformer/custom_layers/batch_invariant_kernels.py) replaces torch's products, log-softmax and mean, and Transformer
Engine's products and RMSNorm, by kernels with one order; engines in their deterministic mode use kernels of the same
origin (Thinking Machines, batch_invariant_ops). The replacement holds for the whole process.

What else follows from it, each read in that file:
- attention is FlashAttention without split keys (Transformer Engine 2.10 or newer);
- products know neither FP8 nor user buffers, and those of grouped experts are not replaced;
- a product drops `accumulate`: it would overwrite the main gradient, so Transformer Engine must not add to it;
- log-probs are computed by torch's product, which is replaced, in place of our Triton path, whose is not: logits are
  rounded to bf16 as an engine's are.
"""

from __future__ import annotations

import sys

from megatron_nft.policy.family import ModelSpec

KERNELS = "megatron.core.transformer.custom_layers.batch_invariant_kernels"


def check_model(spec: ModelSpec) -> None:
    """ValueError for a model whose products are not all replaced."""
    if spec.num_experts:
        raise ValueError(
            "policy.batch_invariant=true: megatron-core has no batch-invariant kernel for the grouped products of "
            f"{spec.num_experts} experts; use a dense model, or leave it out"
        )


def use_batch_invariant_kernels(on: bool) -> None:
    """Replace the kernels of this process, or take the replacement back."""
    if on or KERNELS in sys.modules:  # it imports Triton, which a machine without a GPU need not have
        from megatron.core.transformer.custom_layers import batch_invariant_kernels

        if on:
            batch_invariant_kernels.enable_batch_invariant_mode()
        else:
            batch_invariant_kernels.disable_batch_invariant_mode()
