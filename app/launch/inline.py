"""One rank, in this process: a breakpoint works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from app.config.schema import Config


def launch_inline(
    config: Config, plain: dict[str, Any], trusted: list[str], folder: Path
) -> float | None:
    """Runs it here; gives what `app.run.execute` gives."""
    from app.run import execute

    return execute(config, plain, trusted, folder)
