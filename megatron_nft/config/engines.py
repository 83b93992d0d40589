"""The one table of engines. Here, so that settings can be checked where no engine can be imported."""

from __future__ import annotations

ENGINES = {
    "embedded": "megatron_nft.engines.embedded.kind",
    "sglang": "megatron_nft.engines.sglang.kind",
    "vllm": "megatron_nft.engines.vllm.kind",
}
"""rollout.engine -> the module that holds its `KIND` (engines/kind.py)."""


def known_engine(name: str) -> str:
    """`name`, if the table has it. ValueError else."""
    if name not in ENGINES:
        raise ValueError(f"{name!r} is none of {', '.join(ENGINES)}")
    return name
