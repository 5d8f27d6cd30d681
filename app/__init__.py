"""Train, validate and test PyTorch models; every run is documented in one folder."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

# Torch then asks for huge pages for large tensors on Linux, which halves the time to fill them.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__all__ = ["compose"]


def compose(overrides: list[str], folder: str | None = None) -> Any:
    """Build the configuration and the objects of a command line, for notebooks and scripts.

    Args:
        overrides: The arguments that would follow `python -m app` on the command line.
        folder: The run folder; by default a new one under `outputs/`.

    Returns:
        An `app.experiment.notebook.Experiment`.

    Raises:
        app.runtime.errors.UserError: An override or the resulting configuration is invalid.
    """
    # Imported here so that `import app` imports neither Hydra nor torch.
    return import_module("app.experiment.notebook").compose(overrides, folder)
