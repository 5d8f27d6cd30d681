"""Datasets, and how they become batches on the training device."""
