"""The engine inside the trainer's process."""
