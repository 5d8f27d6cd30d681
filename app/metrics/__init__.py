"""Metrics that torchmetrics does not have, and how a step and a stage measure any of them."""
