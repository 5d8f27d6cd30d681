"""Run a job in a process of another launcher (joblib, submitit, Ray), maybe on another machine.

Such a process shares nothing with the sweep's own process except the folder of the sweep. So a job
holds a lock there while it runs, and polls there whether it should stop.
"""

from __future__ import annotations

import logging
import multiprocessing as mp
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from app.distributed.launch.worker import rank_zero_output
from app.runtime.lock import FolderInUseError
from app.runtime.signals import EXIT_INTERRUPTED, StopSignal, TrainingInterrupted, signal_handlers
from app.sweep.folder import SweepFolder
from app.sweep.outcome import read_run_status

log = logging.getLogger(__name__)
ProcessId = tuple[str, int]  # host name and PID
STOP_POLL_SECONDS = 1.0  # how often a job checks whether it should stop


def current_process_id() -> ProcessId:
    """Return an identifier of this process that is unique across machines."""
    return platform.node(), os.getpid()


def run_external(job: Callable[[], float | None], sweep: SweepFolder, folder: Path) -> float | None:
    """Run a job in a process of another launcher, which must survive the end of the job.

    Args:
        job: Runs the job; may raise or exit as a run with a process of its own does.
        sweep: Folder of the sweep.
        folder: Run folder of the job.

    Returns:
        The result of the job; None if it was stopped, which `status.json` records.
    """
    received: list[int] = []
    mp.set_start_method(mp.get_all_start_methods()[0], force=True)  # joblib replaces the default
    try:
        with sweep.job_locked(folder):
            if read_run_status(folder).is_finished:
                return read_run_status(folder).value
            with (
                _save_on_sigusr2(received),
                StopSignal().installed(),
                _stopping_with_sweep(sweep),
                rank_zero_output(folder),
            ):
                return job()
    except FolderInUseError as error:
        log.warning("%s; skipped", error)
    except (TrainingInterrupted, KeyboardInterrupt, SystemExit) as error:
        if _exit_code(error) == EXIT_INTERRUPTED:
            sweep.stop()
    if received and not sweep.stops_running_jobs:
        signal.raise_signal(received[0])
    return None


@contextmanager
def _save_on_sigusr2(received: list[int]) -> Iterator[None]:
    """Translate SIGUSR2 to SIGUSR1, on which a run saves and stops.

    submitit requeues its job in its own SIGUSR2 handler; the job has to save before that, so the
    signal is raised again after the run.

    Args:
        received: List to which the signal is added.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        received.append(number)
        signal.raise_signal(signal.SIGUSR1)

    has_handler = callable(signal.getsignal(signal.SIGUSR2))
    with signal_handlers(on_signal, ["SIGUSR2"] if has_handler else []):
        yield


@contextmanager
def _stopping_with_sweep(sweep: SweepFolder) -> Iterator[None]:
    """Send SIGTERM to this process as soon as the sweep asks its jobs to stop."""
    main_thread = threading.get_ident()

    def stop_if_requested() -> bool:
        if not sweep.stops_running_jobs:
            return True
        signal.pthread_kill(main_thread, signal.SIGTERM)
        return False

    with polling(stop_if_requested, STOP_POLL_SECONDS):
        yield


@contextmanager
def polling(function: Callable[[], bool], seconds: float) -> Iterator[None]:
    """Call a function repeatedly in a background thread until it returns False.

    Args:
        function: Returns whether to call it again.
        seconds: Time between two calls, and before the first one.
    """
    is_done = threading.Event()

    def poll() -> None:
        while not is_done.wait(seconds) and function():
            pass

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_done.set()
        thread.join()


def _exit_code(error: BaseException) -> int | str | None:
    if isinstance(error, TrainingInterrupted):
        return error.exit_code
    return error.code if isinstance(error, SystemExit) else EXIT_INTERRUPTED
