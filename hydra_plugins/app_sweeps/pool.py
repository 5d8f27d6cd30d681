"""`hydra/launcher=pool`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

if TYPE_CHECKING:
    from app.sweep.pool import Pool


class PoolLauncher(Launcher):
    """Jobs side by side, each in a fresh process; `app.sweep.pool` does the work.

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
        return [
            _result(words, pool, number)
            for number, words in enumerate(job_overrides, initial_job_idx)
        ]

    def _pool(self) -> Pool:
        from app.sweep.pool import pool_of

        loader = self.hydra_context.config_loader
        return pool_of(self.config, loader, self.slots, self.gpus, self.timeout)


def _result(words: Sequence[str], pool: Pool, number: int) -> JobReturn:
    done = number in pool.values
    result = JobReturn(overrides=list(words))
    result.status = JobStatus.COMPLETED if done else JobStatus.FAILED
    result.return_value = pool.values[number] if done else RuntimeError("see the log of the job")
    return result
