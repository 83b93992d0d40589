"""The one table of engines. Here, so that settings can be checked where no engine can be imported."""

from __future__ import annotations

ENGINES = {
    "embedded": "megatron_nft.engines.embedded.kind",
    "sglang": "megatron_nft.engines.sglang.kind",
    "vllm": "megatron_nft.engines.vllm.kind",
}
"""rollout.engine -> the module that holds its `KIND` (engines/kind.py)."""

SHARE_OF = {"sglang": "free", "vllm": "device"}
"""rollout.engine -> what rollout.server.mem_fraction_static is a share of, where an engine has servers: `free`, what is
free on the GPU when a server starts, or `device`, the whole GPU. plan/engine.py has the formulas and their sources."""


def known_engine(name: str) -> str:
    """`name`, if the table has it. ValueError else."""
    if name not in ENGINES:
        raise ValueError(f"{name!r} is none of {', '.join(ENGINES)}")
    return name
