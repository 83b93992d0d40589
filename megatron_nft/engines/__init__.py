"""Generation of answers: one engine protocol, an embedded engine and clients of SGLang and vLLM servers."""

from megatron_nft.engines.open import create_engine, open_engine

__all__ = ["create_engine", "open_engine"]
