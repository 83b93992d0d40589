"""Weights on disk: converting, resharding and comparing Hugging Face folders and Megatron checkpoints."""
