"""Datasets, and the loaders that turn them into batches on the training device."""
