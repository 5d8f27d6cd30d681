"""The jobs of a grid: every combination of the swept values, less those that are over."""

from __future__ import annotations

import logging
from collections import deque

from app.config.overrides import SweepSpace, grid
from app.sweep.driver import StreamingLauncher
from app.sweep.folder import SweepFolder
from app.sweep.job import SweepJob
from app.sweep.outcome import FAILED, RunStatus, read_run_status
from app.sweep.run import Sweep

log = logging.getLogger(__name__)
BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


class GridJobs:
    """Gives the jobs of a grid in their order.

    Args:
        sweep: What was asked for.
        folder: Knows the jobs of earlier goes.
        space: What is swept.
    """

    def __init__(self, sweep: Sweep, folder: SweepFolder, space: SweepSpace) -> None:
        self.sweep, self.folder = sweep, folder
        jobs = {}
        for values in grid(space, sweep.config.sweep.together):
            job = folder.find_job(values) or folder.add(values, space.overrides_for(values))
            if job.number in jobs:
                log.warning("the values of job %d are there twice; they are run once", job.number)
            jobs[job.number] = job
        folder.save()
        self.left = deque(job for job in jobs.values() if self._is_to_run(job))
        done = len(jobs) - len(self.left)
        log.info(
            "%d jobs%s in %s", len(jobs), f", {done} of them over" if done else "", folder.path
        )

    def _is_to_run(self, job: SweepJob) -> bool:
        status = read_run_status(self.folder.run_folder(job))
        limit = self.sweep.config.sweep.max_retries
        if status.status == FAILED and job.failures > limit:
            words = "job %d has failed %d times and is left alone (sweep.max_retries=%d)"
            log.warning(words, job.number, job.failures, limit)
            return False
        return not status.is_finished

    def next_job(self) -> SweepJob | None:
        """The next job; None where there is none."""
        return self.left.popleft() if self.left else None

    def extra_overrides(self, job: SweepJob) -> list[str]:  # noqa: ARG002
        """Nothing else."""
        return []

    def on_job_end(self, job: SweepJob, outcome: RunStatus) -> None:
        """Nothing depends on it."""

    def batch_size(self, launcher: object) -> int:
        """One by one in this process; any other launcher gets all of them."""
        basic = self.sweep.config.hydra.launcher._target_ == BASIC
        return 1 if basic or isinstance(launcher, StreamingLauncher) else max(1, len(self.left))
