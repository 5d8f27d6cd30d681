"""The jobs of a grid: every combination of the swept values that has not finished yet."""

from __future__ import annotations

import logging
from collections import deque

from app.config.overrides import SweepSpace, grid
from app.sweep.driver import JobSource
from app.sweep.folder import SweepFolder
from app.sweep.job import SweepJob
from app.sweep.outcome import FAILED, read_run_status
from app.sweep.run import Sweep

log = logging.getLogger(__name__)


class GridJobs(JobSource):
    """Source of the jobs of a grid, in order.

    Args:
        sweep: Configuration of the sweep.
        folder: Folder with the jobs of earlier commands.
        space: Swept keys and their values.
    """

    def __init__(self, sweep: Sweep, folder: SweepFolder, space: SweepSpace) -> None:
        super().__init__(folder, space, sweep.config.sweep.max_retries)
        jobs = {}
        for values in grid(space, sweep.config.sweep.together):
            job = folder.find_job(values) or folder.add(values)
            job.values = values  # a stranger's folder may have others with the same hash
            if job.number in jobs:
                log.warning("the values of job %d are listed twice; it runs once", job.number)
            jobs[job.number] = job
        folder.save()
        self.pending = deque(job for job in jobs.values() if self._should_run(job))
        num_done = len(jobs) - len(self.pending)
        done = f", {num_done} of them done" if num_done else ""
        log.info("%d jobs%s in %s", len(jobs), done, folder.path)

    @property
    def batch_size(self) -> int:
        """All jobs that are left, for the launcher to divide."""
        return max(1, len(self.pending))

    def next_job(self) -> SweepJob | None:
        """Return the next job; None if all have been taken."""
        return self.pending.popleft() if self.pending else None

    def _should_run(self, job: SweepJob) -> bool:
        status = read_run_status(self.folder.run_folder(job))
        if status.status == FAILED:
            return self.may_retry(job)
        return not status.is_finished
