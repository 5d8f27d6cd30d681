"""Jobs side by side on this machine, each in a fresh process, with devices of its own."""

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
    REASON_BY_SIGNAL,
    SAME_SIGNAL_SECONDS,
    StopReason,
    TrainingInterrupted,
    signal_handlers,
)
from app.sweep.launchers.slots import Slot, make_slots, num_ranks
from app.sweep.outcome import record_failure

log = logging.getLogger(__name__)
Take = Callable[[], tuple[int, Sequence[str]] | None]
PATIENCE = 30.0  # seconds in which a job that was asked to stop is to save what it has


@dataclass
class RunningJob:
    """A slot, and the job in it."""

    slot: Slot
    number: int
    folder: Path
    crew: LocalWorkers
    config: DictConfig
    began: float
    lock: ExitStack
    is_late: bool = False


class Pool:
    """Runs jobs in slots.

    Args:
        config: Of the sweep, as Hydra composed it.
        context: How Hydra composes, and whom it tells of jobs.
        task: What Hydra tells those of.
        slots: One job at a time in each.
        timeout: Seconds that a job may take; None for ever.
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
        self.busy: list[RunningJob] = []
        self.signals: list[int] = []
        self.first_asked = 0.0
        self.values: dict[int, float | None] = {}

    def run(self, take: Take, ended: Callable[[int], None]) -> None:
        """Until there is no job left.

        Args:
            take: Gives the number and the words of the next job; None where there is none now.
            ended: Is told the number of each job that has ended, in whatever way.

        Raises:
            Stopped: It was asked to end; all jobs have.
            KeyboardInterrupt: Asked twice.
        """
        try:
            with signal_handlers(self._hear):
                while self._fill(take, ended) or self.busy:
                    self._attend(ended)
        finally:
            for busy in self.busy:
                busy.crew.kill()
                busy.lock.close()
        if self.signals:
            raise TrainingInterrupted(
                max(REASON_BY_SIGNAL[signal.Signals(one).name] for one in self.signals)
            )

    def _fill(self, take: Take, ended: Callable[[int], None]) -> bool:
        """Begins jobs while there are slots and jobs; whether one could not even begin."""
        used = [busy.slot for busy in self.busy]
        for slot in [slot for slot in self.slots if slot not in used]:
            job = None if self.signals else take()
            if job is None:
                return False
            if not self._begin(slot, *job):
                ended(job[0])
                return True
        return False

    def _begin(self, slot: Slot, number: int, words: Sequence[str]) -> bool:
        folder, lock = None, ExitStack()
        try:
            config = self._compose(number, words)
            folder = Path(config.hydra.runtime.output_dir)
            lock.enter_context(run_lock(folder))
            remove_temp_files(folder)
            with env_override(config.hydra.job.env_set):
                crew = self._crew(slot, config, folder)
            self.context.callbacks.on_job_start(config=config, task_function=self.task)
            crew.start()
        except FolderInUseError as error:
            log.error("job %d: %s", number, error)
            return False
        except Exception as error:  # noqa: BLE001 - as of any job, it is in its log
            folder = folder or _folder_of(self.config, words)
            folder.mkdir(parents=True, exist_ok=True)
            record_failure(folder, RankFailure.from_exception(0, error))
            lock.close()
            return False
        self.busy.append(RunningJob(slot, number, folder, crew, config, time.monotonic(), lock))
        for signal_number in self.signals:  # that came while it began
            crew.send_signal(signal_number)
        log.info("job %d begins: %s", number, folder.name)
        return True

    def _compose(self, number: int, words: Sequence[str]) -> DictConfig:
        """As `hydra.core.utils.run_job` does, but for the logging of this process."""
        config = self.context.config_loader.load_sweep_config(self.config, list(words))
        with read_write(config), open_dict(config):
            config.hydra.job.id, config.hydra.job.num = str(number), number
            folder = Path(config.hydra.sweep.dir) / str(config.hydra.sweep.subdir)
            config.hydra.runtime.output_dir = str(folder.absolute())
        HydraConfig.instance().set_config(config)
        folder.mkdir(parents=True, exist_ok=True)
        task = copy.deepcopy(config)
        with read_write(task), open_dict(task):
            del task["hydra"]
        own = OmegaConf.create({"hydra": copy.deepcopy(config.hydra)})
        inside = folder / str(config.hydra.output_subdir)
        _save_config(task, "config.yaml", inside)
        _save_config(own, "hydra.yaml", inside)
        _save_config(config.hydra.overrides.task, "overrides.yaml", inside)
        return config

    def _crew(self, slot: Slot, config: DictConfig, folder: Path) -> LocalWorkers:
        job = prepare(config, folder)
        ranks = num_ranks(job.config.trainer.devices, len(slot.gpus))
        if slot.gpus and ranks > len(slot.gpus):
            devices = job.config.trainer.devices
            raise UserError(f"trainer.devices={devices!r}, but the slot has {len(slot.gpus)} GPUs")
        logging_config: Any = OmegaConf.to_container(config.hydra.job_logging, resolve=True)
        return LocalWorkers(
            run_experiment, job, folder, ranks, logging_config, slot.environment(ranks), quiet=True
        )

    def _attend(self, ended: Callable[[int], None]) -> None:
        awaited = [one for busy in self.busy for one in busy.crew.wait_handles]
        ready = wait(awaited, timeout=0.2)
        for busy in list(self.busy):
            busy.crew.poll([one for one in ready if one in busy.crew.wait_handles])
            self._watch_clock(busy)
            if busy.crew.is_finished:
                self._end(busy)
                ended(busy.number)

    def _watch_clock(self, busy: RunningJob) -> None:
        """A job that takes too long is asked to stop, then ended."""
        taken = time.monotonic() - busy.began
        if self.timeout is None or taken < self.timeout:
            return
        if not busy.is_late:
            busy.is_late = True
            busy.crew.send_signal(signal.SIGTERM)
        elif taken > self.timeout + PATIENCE:
            busy.crew.kill()
            busy.crew.sentinels.clear()
            busy.crew.failures.setdefault(0, RankFailure(0, "died", "it did not stop"))

    def _end(self, busy: RunningJob) -> None:
        """What became of a job stands in its folder."""
        self.busy.remove(busy)
        failure = None
        try:
            self.values[busy.number] = busy.crew.result()
        except RankFailedError as error:
            failure = error.failure
        except (UserError, KeyboardInterrupt) as error:
            failure = RankFailure.from_exception(0, error)
        except TrainingInterrupted:
            pass  # its folder says so
        finally:
            busy.crew.kill()
        if busy.is_late and busy.number not in self.values:
            key = "hydra.launcher.timeout"
            failure = RankFailure(0, "user", f"it took more than {self.timeout:g} s ({key})")
            record_rank_failure(busy.folder, failure)
        if failure is not None:
            record_failure(busy.folder, failure)
        busy.lock.close()
        self.context.callbacks.on_job_end(config=busy.config, job_return=self.result(busy.number))

    def result(self, number: int) -> JobReturn:
        """Of a job that has ended, as Hydra knows it."""
        result, done = JobReturn(), number in self.values
        result.status = JobStatus.COMPLETED if done else JobStatus.FAILED
        result.return_value = self.values[number] if done else RuntimeError("its log says why")
        return result

    def _hear(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """All jobs stop, and no further one begins; the second Ctrl-C ends them at once."""
        again = number in self.signals and time.monotonic() - self.first_asked > SAME_SIGNAL_SECONDS
        if again and REASON_BY_SIGNAL[signal.Signals(number).name] is StopReason.INTERRUPTED:
            for busy in self.busy:
                busy.crew.kill()
                record_rank_failure(busy.folder, RankFailure(0, "interrupted", "KeyboardInterrupt"))
            raise KeyboardInterrupt
        if not self.signals:
            self.first_asked = time.monotonic()
            sys.stderr.write("\nall jobs stop after this step; Ctrl-C again ends them at once\n")
        self.signals.append(number)
        for busy in self.busy:
            busy.crew.send_signal(number)


def make_pool(
    config: DictConfig,
    context: HydraContext,
    task: TaskFunction,
    slots: int | Literal["auto"],
    gpus: Sequence[int] | Literal["auto"],
    timeout: float | None,
) -> Pool:
    """A pool as the configuration of the sweep says.

    Raises:
        ConfigError: The machine cannot be shared out so.
    """
    devices: Any = OmegaConf.to_container(config)["trainer"]["devices"]  # type: ignore[index,call-overload]
    made = make_slots(config.trainer.accelerator, devices, slots, gpus)
    told = "; ".join(f"{one.number}: {_described(one)}" for one in made)
    log.info("%d slots (%s)", len(made), told)
    return Pool(config, context, task, made, timeout)


def _described(slot: Slot) -> str:
    gpus = f"GPU {', '.join(slot.gpus)}, " if slot.gpus else ""
    return f"{gpus}{slot.threads} threads"


def _folder_of(config: DictConfig, words: Sequence[str]) -> Path:
    """Where a job that cannot be composed would have been."""
    key = "hydra.sweep.subdir="
    name = next(word.removeprefix(key) for word in words if word.startswith(key))
    return Path(str(config.hydra.sweep.dir)).absolute() / name.strip("'")
