"""Sweeps: their jobs, the launchers that run them, and the report at the end."""
