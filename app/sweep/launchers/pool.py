"""Run several jobs in parallel on this machine, each in a new process with its own devices."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, Literal

from hydra._internal.callbacks import Callbacks
from hydra.core.utils import JobReturn, JobStatus, run_job
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from app.distributed.launch.failures import RankFailure, record_rank_failure
from app.distributed.launch.local import LocalWorkers
from app.experiment.entry import run_experiment
from app.experiment.job import prepare
from app.runtime.errors import UserError
from app.runtime.files import remove_temp_files
from app.runtime.lock import FolderInUseError, run_lock
from app.runtime.signals import StopReason, StopSignal, TrainingInterrupted
from app.sweep.launchers.runner import ComposedJob, NextJob, OnJobEnd
from app.sweep.launchers.slots import Slot, make_slots, num_ranks
from app.sweep.outcome import record_failure

log = logging.getLogger(__name__)
STOP_GRACE_SECONDS = 30.0  # for a job that exceeded its timeout to save and stop


class Pool:
    """Runs jobs in slots.

    Args:
        context: Hydra's config loader and callbacks.
        task: The task function that Hydra passes to its callbacks.
        slots: Each runs one job at a time.
        timeout: Maximum duration of a job in seconds; None for no limit.

    Attributes:
        results: Results of the jobs that have ended, by number, in Hydra's form.
    """

    def __init__(
        self, context: HydraContext, task: TaskFunction, slots: list[Slot], timeout: float | None
    ) -> None:
        self.context, self.slots, self.timeout = context, slots, timeout
        start_callbacks = StartCallbacks(context.callbacks, task)
        self.start_context = HydraContext(context.config_loader, start_callbacks)
        self.running: list[RunningJob] = []
        self.stop = StopSignal(forward=self._request_stop)
        self.results: dict[int, JobReturn] = {}

    def run_jobs(self, next_job: NextJob, on_job_end: OnJobEnd) -> None:
        """Run jobs until there are none left; see `app.sweep.launchers.runner.JobRunner`."""
        with self.stop.installed():
            try:
                while self._fill_slots(next_job, on_job_end) or self.running:
                    self._poll(on_job_end)
            except KeyboardInterrupt:
                for running in self.running:
                    running.workers.interrupt()
                raise
            finally:
                for running in self.running:
                    running.workers.kill()
                    running.lock.close()
        if self.stop.requested:
            raise TrainingInterrupted(self.stop.requested)

    def _fill_slots(self, next_job: NextJob, on_job_end: OnJobEnd) -> bool:
        """Start jobs in free slots; return True when one failed to start, so more may be left."""
        used = [running.slot for running in self.running]
        for slot in [slot for slot in self.slots if slot not in used]:
            job = None if self.stop.requested else next_job()
            if job is None:
                return False
            try:
                self._start(slot, job)
            except Exception as error:  # noqa: BLE001 - the job fails, and its log has the traceback
                self._on_start_failure(job, error)
                on_job_end(job.number)
                return True
        return False

    def _start(self, slot: Slot, job: ComposedJob) -> None:
        """Start the ranks of a job, after Hydra has prepared its folder.

        Raises:
            Exception: The job cannot start.
        """
        workers: list[LocalWorkers] = []

        def start_workers(_: DictConfig) -> None:
            lock.enter_context(run_lock(job.folder))
            remove_temp_files(job.folder)
            workers.append(make_workers(slot, job))
            lock.callback(workers[0].kill)  # before the lock is released
            workers[0].start()

        with ExitStack() as lock:
            result = run_job(
                start_workers,
                job.config,
                "hydra.sweep.dir",
                "hydra.sweep.subdir",
                self.start_context,
                configure_logging=False,
            )
            if result.status is JobStatus.FAILED:
                raise result._return_value
            running = RunningJob(slot, job, workers[0], result, time.monotonic(), lock.pop_all())
        self.running.append(running)
        if self.stop.requested:  # while the job started
            running.workers.request_stop(self.stop.requested)
        log.info("job %d started: %s", job.number, job.folder.name)

    def _on_start_failure(self, job: ComposedJob, error: Exception) -> None:
        if isinstance(error, FolderInUseError):
            log.error("job %d: %s", job.number, error)
        else:
            job.folder.mkdir(parents=True, exist_ok=True)
            record_failure(job.folder, RankFailure.from_exception(0, error))
        self.results[job.number] = JobReturn(_return_value=error, status=JobStatus.FAILED)

    def _poll(self, on_job_end: OnJobEnd) -> None:
        handles = [handle for running in self.running for handle in running.workers.wait_handles]
        ready = wait(handles, timeout=0.2)
        for running in list(self.running):
            own = running.workers.wait_handles
            running.workers.poll([handle for handle in ready if handle in own])
            self._check_timeout(running)
            if running.workers.is_finished:
                self._finish(running)
                on_job_end(running.job.number)

    def _check_timeout(self, running: RunningJob) -> None:
        """Ask a job that has exceeded its timeout to stop; kill it if it does not."""
        elapsed = time.monotonic() - running.started_at
        if self.timeout is None or elapsed < self.timeout:
            return
        if not running.is_timed_out:
            running.is_timed_out = True
            running.workers.request_stop(StopReason.PREEMPTED)
        elif elapsed > self.timeout + STOP_GRACE_SECONDS:
            running.workers.kill()

    def _finish(self, running: RunningJob) -> None:
        """Record the result of a job that has ended, and release its slot and lock."""
        self.running.remove(running)
        job, result, failure = running.job, running.result, running.workers.failure
        running.workers.kill()
        if failure is not None and running.is_timed_out:
            reason = f"the job took more than {self.timeout:g} s (hydra.launcher.timeout)"
            failure = RankFailure(0, "user", reason)
        if failure is None:
            result.return_value = running.workers.results[0]
        else:
            result.status = JobStatus.FAILED
            result.return_value = RuntimeError("the job did not complete; see its run.log")
            record_rank_failure(job.folder, failure)
            if failure.kind != "stopped":
                record_failure(job.folder, failure)
        running.lock.close()
        self.results[job.number] = result
        self.context.callbacks.on_job_end(config=job.config, job_return=result)

    def _request_stop(self, reason: StopReason) -> None:
        for running in self.running:
            running.workers.request_stop(reason)


@dataclass
class RunningJob:
    """A job and the slot in which it runs."""

    slot: Slot
    job: ComposedJob
    workers: LocalWorkers
    result: JobReturn
    started_at: float
    lock: ExitStack
    is_timed_out: bool = False


class StartCallbacks(Callbacks):
    """Hydra's callbacks at the start of a job; the pool calls them itself at its end."""

    def __init__(self, callbacks: Callbacks, task: TaskFunction) -> None:
        self.callbacks, self.task = callbacks.callbacks, task

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        super().on_job_start(config, task_function=self.task)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Do nothing: the job has only started."""


def make_pool(
    config: DictConfig,
    context: HydraContext,
    task: TaskFunction,
    slots: int | Literal["auto"],
    gpus: Sequence[int] | Literal["auto"],
    timeout: float | None,
) -> Pool:
    """Make a pool from the configuration of the sweep.

    Raises:
        ConfigError: The machine cannot be divided into these slots.
    """
    devices: Any = OmegaConf.to_container(config)["trainer"]["devices"]  # type: ignore[index,call-overload]
    made = make_slots(config.trainer.accelerator, devices, slots, gpus)
    log.info("pool: %d slots (%s)", len(made), "; ".join(map(str, made)))
    return Pool(context, task, made, timeout)


def make_workers(slot: Slot, job: ComposedJob) -> LocalWorkers:
    """Prepare the ranks of a job for a slot.

    Raises:
        UserError: The configuration of the job is invalid, or needs more GPUs than the slot has.
    """
    prepared = prepare(job.config, job.folder)
    devices = prepared.config.trainer.devices
    ranks = num_ranks(devices, len(slot.gpus))
    if slot.gpus and ranks > len(slot.gpus):
        raise UserError(f"trainer.devices={devices!r}, but the slot has {len(slot.gpus)} GPUs")
    logging_config: Any = OmegaConf.to_container(job.config.hydra.job_logging, resolve=True)
    variables = slot.environment(ranks)
    return LocalWorkers(
        run_experiment, prepared, job.folder, ranks, logging_config, variables, quiet=True
    )
