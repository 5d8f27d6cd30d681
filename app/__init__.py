"""Train, validate and test PyTorch models; every run leaves one folder that says everything."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def compose(overrides: list[str], folder: str | None = None) -> Any:
    """The configuration and the objects of a command line, for notebooks.

    Args:
        overrides: As they would be typed after `python -m app`.
        folder: Of the run; None makes a new one under `outputs/`.

    Returns:
        An `app.experiment.notebook.Experiment`.

    Raises:
        app.runtime.errors.UserError: Whatever is wrong with them.
    """
    # By name, so that importing the package imports neither Hydra nor torch.
    return import_module("app.experiment.notebook").compose(overrides, folder)
