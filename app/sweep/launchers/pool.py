"""Run several jobs in parallel on this machine, each in a new process with its own devices."""

from __future__ import annotations

import copy
import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, _save_config, env_override
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from app.distributed.launch.failures import RankFailedError, RankFailure, record_rank_failure
from app.distributed.launch.local import LocalWorkers
from app.experiment.entry import run_experiment
from app.experiment.job import prepare
from app.runtime.errors import UserError
from app.runtime.files import remove_temp_files
from app.runtime.lock import FolderInUseError, run_lock
from app.runtime.signals import (
    DUPLICATE_SIGNAL_SECONDS,
    REASON_BY_SIGNAL,
    StopReason,
    TrainingInterrupted,
    signal_handlers,
)
from app.sweep.launchers.slots import Slot, make_slots, num_ranks
from app.sweep.outcome import record_failure

log = logging.getLogger(__name__)
NextJob = Callable[[], tuple[int, Sequence[str]] | None]
STOP_GRACE_SECONDS = 30.0  # for a job that exceeded its timeout to save and stop


class Pool:
    """Runs jobs in slots.

    Args:
        config: Configuration of the sweep as composed by Hydra.
        context: Hydra's config loader and callbacks.
        task: The task function that Hydra passes to its callbacks.
        slots: Each runs one job at a time.
        timeout: Maximum duration of a job in seconds; None for no limit.
    """

    def __init__(
        self,
        config: DictConfig,
        context: HydraContext,
        task: TaskFunction,
        slots: Sequence[Slot],
        timeout: float | None,
    ) -> None:
        self.config, self.context, self.task = config, context, task
        self.slots, self.timeout = list(slots), timeout
        self.running: list[RunningJob] = []
        self.signals: list[int] = []
        self.first_signal_at = 0.0
        self.values: dict[int, float | None] = {}  # of completed jobs, by number

    def run(self, next_job: NextJob, on_job_end: Callable[[int], None]) -> None:
        """Run jobs until there are none left.

        Args:
            next_job: Returns the number and the overrides of the next job; None if there is none
                now.
            on_job_end: Called with the number of each job that has ended, whatever its status.

        Raises:
            TrainingInterrupted: A signal has asked to stop, and all jobs have stopped.
            KeyboardInterrupt: Ctrl-C was pressed twice.
        """
        try:
            with signal_handlers(self._on_signal):
                while self._fill_slots(next_job, on_job_end) or self.running:
                    self._poll(on_job_end)
        finally:
            for job in self.running:
                job.workers.kill()
                job.lock.close()
        if self.signals:
            raise TrainingInterrupted(
                max(REASON_BY_SIGNAL[signal.Signals(number).name] for number in self.signals)
            )

    def _fill_slots(self, next_job: NextJob, on_job_end: Callable[[int], None]) -> bool:
        """Start jobs in free slots; return True when one failed to start, so more may be left."""
        used = [job.slot for job in self.running]
        for slot in [slot for slot in self.slots if slot not in used]:
            job = None if self.signals else next_job()
            if job is None:
                return False
            if not self._start(slot, *job):
                on_job_end(job[0])
                return True
        return False

    def _start(self, slot: Slot, number: int, overrides: Sequence[str]) -> bool:
        folder, lock = None, ExitStack()
        try:
            config = self._compose(number, overrides)
            folder = Path(config.hydra.runtime.output_dir)
            lock.enter_context(run_lock(folder))
            remove_temp_files(folder)
            with env_override(config.hydra.job.env_set):
                workers = self._make_workers(slot, config, folder)
            self.context.callbacks.on_job_start(config=config, task_function=self.task)
            workers.start()
        except FolderInUseError as error:
            log.error("job %d: %s", number, error)
            return False
        except Exception as error:  # noqa: BLE001 - the job fails, and its log has the traceback
            folder = folder or _run_folder(self.config, overrides)
            folder.mkdir(parents=True, exist_ok=True)
            record_failure(folder, RankFailure.from_exception(0, error))
            lock.close()
            return False
        started_at = time.monotonic()
        self.running.append(RunningJob(slot, number, folder, workers, config, started_at, lock))
        for signal_number in self.signals:  # received while the job started
            workers.send_signal(signal_number)
        log.info("job %d started: %s", number, folder.name)
        return True

    def _compose(self, number: int, overrides: Sequence[str]) -> DictConfig:
        """Compose a job as `hydra.core.utils.run_job` does, without configuring logging here."""
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with read_write(config), open_dict(config):
            config.hydra.job.id, config.hydra.job.num = str(number), number
            folder = Path(config.hydra.sweep.dir) / str(config.hydra.sweep.subdir)
            config.hydra.runtime.output_dir = str(folder.absolute())
        HydraConfig.instance().set_config(config)
        folder.mkdir(parents=True, exist_ok=True)
        task_config = copy.deepcopy(config)
        with read_write(task_config), open_dict(task_config):
            del task_config["hydra"]
        hydra_config = OmegaConf.create({"hydra": copy.deepcopy(config.hydra)})
        output = folder / str(config.hydra.output_subdir)
        _save_config(task_config, "config.yaml", output)
        _save_config(hydra_config, "hydra.yaml", output)
        _save_config(config.hydra.overrides.task, "overrides.yaml", output)
        return config

    def _make_workers(self, slot: Slot, config: DictConfig, folder: Path) -> LocalWorkers:
        job = prepare(config, folder)
        ranks = num_ranks(job.config.trainer.devices, len(slot.gpus))
        if slot.gpus and ranks > len(slot.gpus):
            devices = job.config.trainer.devices
            raise UserError(f"trainer.devices={devices!r}, but the slot has {len(slot.gpus)} GPUs")
        logging_config: Any = OmegaConf.to_container(config.hydra.job_logging, resolve=True)
        return LocalWorkers(
            run_experiment, job, folder, ranks, logging_config, slot.environment(ranks), quiet=True
        )

    def _poll(self, on_job_end: Callable[[int], None]) -> None:
        handles = [handle for job in self.running for handle in job.workers.wait_handles]
        ready = wait(handles, timeout=0.2)
        for job in list(self.running):
            job.workers.poll([handle for handle in ready if handle in job.workers.wait_handles])
            self._check_timeout(job)
            if job.workers.is_finished:
                self._finish(job)
                on_job_end(job.number)

    def _check_timeout(self, job: RunningJob) -> None:
        """Ask a job that exceeds the timeout to stop, and kill it after a grace period."""
        elapsed = time.monotonic() - job.started_at
        if self.timeout is None or elapsed < self.timeout:
            return
        if not job.is_timed_out:
            job.is_timed_out = True
            job.workers.send_signal(signal.SIGTERM)
        elif elapsed > self.timeout + STOP_GRACE_SECONDS:
            job.workers.kill()
            job.workers.sentinels.clear()
            failure = RankFailure(0, "died", "the process did not stop when asked to")
            job.workers.failures.setdefault(0, failure)

    def _finish(self, job: RunningJob) -> None:
        """Record the result of a job that has ended, and release its slot and lock."""
        self.running.remove(job)
        failure = None
        try:
            self.values[job.number] = job.workers.result()
        except RankFailedError as error:
            failure = error.failure
        except (UserError, KeyboardInterrupt) as error:
            failure = RankFailure.from_exception(0, error)
        except TrainingInterrupted:
            pass  # the run has recorded it
        finally:
            job.workers.kill()
        if job.is_timed_out and job.number not in self.values:
            reason = f"the job took more than {self.timeout:g} s (hydra.launcher.timeout)"
            failure = RankFailure(0, "user", reason)
            record_rank_failure(job.folder, failure)
        if failure is not None:
            record_failure(job.folder, failure)
        job.lock.close()
        self.context.callbacks.on_job_end(config=job.config, job_return=self.result(job.number))

    def result(self, number: int) -> JobReturn:
        """Return the result of a job that has ended in Hydra's form."""
        result, is_completed = JobReturn(), number in self.values
        result.status = JobStatus.COMPLETED if is_completed else JobStatus.FAILED
        error = RuntimeError("the job did not complete; see its run.log")
        result.return_value = self.values[number] if is_completed else error
        return result

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Ask all jobs to stop, and start no further ones; a second Ctrl-C kills the jobs."""
        is_repeated = (
            number in self.signals
            and time.monotonic() - self.first_signal_at > DUPLICATE_SIGNAL_SECONDS
        )
        if is_repeated and REASON_BY_SIGNAL[signal.Signals(number).name] is StopReason.INTERRUPTED:
            for job in self.running:
                job.workers.kill()
                record_rank_failure(job.folder, RankFailure(0, "interrupted", "KeyboardInterrupt"))
            raise KeyboardInterrupt
        if not self.signals:
            self.first_signal_at = time.monotonic()
            sys.stderr.write("\nstopping all jobs after this step; Ctrl-C again kills them\n")
        self.signals.append(number)
        for job in self.running:
            job.workers.send_signal(number)


@dataclass
class RunningJob:
    """A job and the slot in which it runs."""

    slot: Slot
    number: int
    folder: Path
    workers: LocalWorkers
    config: DictConfig
    started_at: float
    lock: ExitStack
    is_timed_out: bool = False


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
    descriptions = "; ".join(f"{slot.number}: {_describe(slot)}" for slot in made)
    log.info("pool: %d slots (%s)", len(made), descriptions)
    return Pool(config, context, task, made, timeout)


def _describe(slot: Slot) -> str:
    gpus = f"GPU {', '.join(slot.gpus)}, " if slot.gpus else ""
    return f"{gpus}{slot.threads} threads"


def _run_folder(config: DictConfig, overrides: Sequence[str]) -> Path:
    """The run folder of a job whose configuration could not be composed."""
    key = "hydra.sweep.subdir="
    name = next(text.removeprefix(key) for text in overrides if text.startswith(key))
    return Path(str(config.hydra.sweep.dir)).absolute() / name.strip("'")
