"""Optimizers, learning rate schedules, weight averaging and freezing."""
