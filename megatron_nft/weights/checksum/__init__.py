"""Checksums that trainer and engines compute alike. vLLM's worker has this folder on its PYTHONPATH (engines/vllm)."""
