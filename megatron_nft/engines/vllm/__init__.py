"""Everything that is vLLM's own."""
