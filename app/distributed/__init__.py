"""Collectives, strategies and launchers for training on several ranks."""
