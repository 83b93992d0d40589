"""Checkpoints on disk: convert, reshard and compare them."""
