"""Generation of answers: one engine protocol, an embedded engine and clients of SGLang and vLLM servers."""

from megatron_nft.rollout.create import create_engine, open_engine

__all__ = ["create_engine", "open_engine"]
