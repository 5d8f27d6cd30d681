"""Losses that configurations name."""
