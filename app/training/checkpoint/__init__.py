"""Checkpoints: what they hold, when they are saved, how they are read."""
