"""Metrics that torchmetrics does not have, and the evaluation of metrics by step and stage."""
