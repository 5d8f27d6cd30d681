"""`hydra/launcher=pool`."""

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
    """Jobs side by side, each in a fresh process; `app.sweep.launchers.pool` does the work.

    Args:
        slots: Jobs at once.
        gpus: Ids of the GPUs that are shared out.
        timeout: Seconds that a job may take; None for ever.
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
        """What Hydra tells before it begins."""
        self.hydra_context, self.config = hydra_context, config
        self.task_function = task_function

    def stream(
        self,
        take: Callable[[], tuple[int, Sequence[str]] | None],
        ended: Callable[[int], None],
    ) -> None:
        """Runs jobs, the next as soon as there is room for it."""
        self._pool().run(take, ended)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Runs these jobs."""
        jobs = iter(list(enumerate(job_overrides, initial_job_idx)))
        pool = self._pool()
        pool.run(lambda: next(jobs, None), lambda _: None)
        return [pool.result(number) for number, _ in enumerate(job_overrides, initial_job_idx)]

    def _pool(self) -> Pool:
        from app.sweep.launchers.pool import make_pool

        context, task = self.hydra_context, self.task_function
        return make_pool(self.config, context, task, self.slots, self.gpus, self.timeout)
