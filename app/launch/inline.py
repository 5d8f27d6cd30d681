"""One rank, in this process: a breakpoint works."""

from __future__ import annotations

from pathlib import Path

from app.config.schema import Job


def launch_inline(job: Job, folder: Path) -> float | None:
    """Runs it here; gives what `app.run.execute` gives."""
    from app.run import execute

    return execute(job, folder)
