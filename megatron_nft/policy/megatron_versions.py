"""Where the supported versions of megatron-core differ, for us. A line each; versions are those of `stack.TESTED`.

What is not here is the same in all of them, as the tests show that run on each.
"""

from __future__ import annotations

from typing import Any

ONLY_WITH_TRANSFORMER_ENGINE: dict[tuple[str, str], Any] = {
    ("megatron.core.transformer.moe.moe_utils", "te_general_gemm"): None,  # 0.16.1; 0.19 always defines it
}
"""(module, name) -> value: names that megatron-core reads but defines only where Transformer Engine is installed."""
