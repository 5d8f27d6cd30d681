"""The plugin `hydra/launcher=pool`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

if TYPE_CHECKING:
    from app.sweep.launchers.pool import Pool


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

    def stream(
        self,
        next_job: Callable[[], tuple[int, Sequence[str]] | None],
        on_job_end: Callable[[int], None],
    ) -> None:
        """Run jobs, each as soon as a slot is free; see `app.sweep.driver.StreamingLauncher`."""
        self._make_pool().run(next_job, on_job_end)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run a batch of jobs, and wait for all of them."""
        jobs = iter(list(enumerate(job_overrides, initial_job_idx)))
        pool = self._make_pool()
        pool.run(lambda: next(jobs, None), lambda _: None)
        return [pool.result(number) for number, _ in enumerate(job_overrides, initial_job_idx)]

    def _make_pool(self) -> Pool:
        from app.sweep.launchers.pool import make_pool

        context, task = self.hydra_context, self.task_function
        return make_pool(self.config, context, task, self.slots, self.gpus, self.timeout)
