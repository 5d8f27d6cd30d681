"""One rank, in this process: a breakpoint works."""

from __future__ import annotations

from pathlib import Path

from app.config.schema import Job
from app.runtime.signals import Stop


def launch_inline(job: Job, folder: Path) -> float | None:
    """Runs it here; gives what `app.run.execute` gives."""
    from app.run import execute

    stop = Stop()
    with stop.listening():
        return execute(job, folder, stop)
