"""Modules that run inside the processes of an engine's own environment, and let nobody in without the run's key."""
