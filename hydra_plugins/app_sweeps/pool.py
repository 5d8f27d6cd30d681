"""The plugin `hydra/launcher=pool`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

if TYPE_CHECKING:
    from app.sweep.launchers.pool import Pool
    from app.sweep.launchers.runner import NextJob, OnJobEnd


class PoolLauncher(Launcher):
    """Runs jobs in parallel, each in a new process; implemented in `app.sweep.launchers.pool`.

    Args:
        slots: Number of parallel jobs.
        gpus: Indices of the GPUs to use.
        timeout: Maximum duration of a job in seconds; None for no limit.
    """

    def __init__(
        self,
        slots: int | Literal["auto"] = "auto",
        gpus: list[int] | Literal["auto"] = "auto",
        timeout: float | None = None,
    ) -> None:
        self.slots, self.gpus, self.timeout = slots, gpus, timeout

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Store what Hydra passes before the sweep."""
        self.hydra_context, self.config = hydra_context, config
        self.task_function = task_function

    def run_jobs(self, next_job: NextJob, on_job_end: OnJobEnd) -> None:
        """Run jobs, each as soon as a slot is free; see `app.sweep.launchers.runner.JobRunner`."""
        self._make_pool().run_jobs(next_job, on_job_end)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run a batch of jobs, and wait for all of them."""
        from app.sweep.launchers.runner import compose_job

        loader, pool = self.hydra_context.config_loader, self._make_pool()
        numbered = list(enumerate(job_overrides, initial_job_idx))
        jobs = (compose_job(loader, self.config, number, texts) for number, texts in numbered)
        pool.run_jobs(lambda: next(jobs, None), lambda _: None)
        return [pool.results[number] for number, _ in numbered]

    def _make_pool(self) -> Pool:
        from app.sweep.launchers.pool import make_pool

        context, task = self.hydra_context, self.task_function
        return make_pool(self.config, context, task, self.slots, self.gpus, self.timeout)
