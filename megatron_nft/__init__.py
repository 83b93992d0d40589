"""Negative-aware Fine-Tuning (arXiv 2505.18116) on Megatron-Core."""

__version__ = "0.1.0"
