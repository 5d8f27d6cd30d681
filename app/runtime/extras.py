"""Libraries that only the optional features (extras) of the package need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from app.runtime.errors import UserError


def import_extra(module: str, extra: str) -> Any:
    """Import a module of a library that an extra installs.

    Raises:
        UserError: The library is not installed; the message names the command that installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        install = f'pip install "torch-experiment-app[{extra}]"'
        raise UserError(f"{library} is not installed; to install it: {install}") from error
