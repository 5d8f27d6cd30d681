"""The function that a launcher runs on each rank."""

from __future__ import annotations

from pathlib import Path

from app.config.schema import Job
from app.runtime.signals import StopSignal


def run_experiment(
    job: Job, folder: Path, stop: StopSignal | None = None, local_rank: int = 0
) -> float | None:
    """Run this rank's share of a job; see `app.experiment.run.execute`.

    The command line passes this function to a launcher before torch is imported anywhere, hence
    the import inside.
    """
    from app.experiment.run import execute

    return execute(job, folder, stop, local_rank)
