"""Generation of answers: one engine protocol, an embedded engine, and clients of SGLang and vLLM servers."""
