"""Jobs in processes that a launcher has started for them, on this machine or another.

They share nothing with who drives the sweep but its folder; so a job holds a lock there as long as
it runs, and looks there whether it is to stop.
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

from filelock import FileLock, Timeout

from app.runtime.files import write_text
from app.runtime.signals import EXIT_INTERRUPTED, StopSignal, TrainingInterrupted
from app.sweep.folder import SweepFolder
from app.sweep.outcome import read_run_status

log = logging.getLogger(__name__)
ProcessId = tuple[str, int]
LOOKS = 1.0  # seconds after which a job looks whether it is to stop
NOW = "now"  # in the mark of a sweep that is to begin no job: those that run stop, too


def current_process_id() -> ProcessId:
    """Its name among the processes of all machines."""
    return platform.node(), os.getpid()


def run_external(job: Callable[[], float | None], sweep: SweepFolder, folder: Path) -> float | None:
    """Runs a job where others are that must not end with it.

    Args:
        job: Ends as a run that has a process of its own does.
        sweep: Whose it is.
        folder: Of the run.

    Returns:
        What the job gives; None where it was stopped, which its folder says.
    """
    lock = _lock(sweep, folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("%s is being run by another process", folder)
        return None
    asked: list[int] = []
    mp.set_start_method(mp.get_all_start_methods()[0], force=True)  # joblib has one of its own
    try:
        if read_run_status(folder).is_finished:
            return read_run_status(folder).value
        with _heard_first(asked), StopSignal().installed(), _watched(sweep), _printed(folder):
            return job()
    except (TrainingInterrupted, KeyboardInterrupt, SystemExit) as end:
        if _code(end) == EXIT_INTERRUPTED:
            sweep.set_stopped(stopped=True)
    finally:
        lock.release()
    if asked and not stop_requested(sweep):
        signal.raise_signal(asked[0])
    return None


def _lock(sweep: SweepFolder, folder: Path) -> FileLock:
    path = sweep.state_folder / "running" / f"{folder.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)


def is_running(sweep: SweepFolder, folder: Path) -> bool:
    """Whether a process runs the job in that folder; however it ends, its lock ends with it."""
    lock = _lock(sweep, folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def request_stop(sweep: SweepFolder) -> None:
    """No further job begins, and those that run save what they have and stop."""
    write_text(sweep.state_folder / "stopped", NOW)


def stop_requested(sweep: SweepFolder) -> bool:
    """Whether somebody has asked for that."""
    return sweep.is_stopped and (sweep.state_folder / "stopped").read_text() == NOW


@contextmanager
def _heard_first(asked: list[int]) -> Iterator[None]:
    """SIGUSR2 is submitit's: it queues the job again, which first has to save what it has.

    Args:
        asked: Gets the signal.
    """
    own = signal.getsignal(signal.SIGUSR2) if hasattr(signal, "SIGUSR2") else None
    if not callable(own) or threading.current_thread() is not threading.main_thread():
        yield
        return

    def hear(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        asked.append(number)
        signal.raise_signal(signal.SIGUSR1)

    signal.signal(signal.SIGUSR2, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR2, own)


@contextmanager
def _watched(sweep: SweepFolder) -> Iterator[None]:
    """This process gets a signal as soon as the sweep is to end."""
    over, main = threading.Event(), threading.get_ident()

    def watch() -> None:
        while not over.wait(LOOKS):
            if stop_requested(sweep):
                signal.pthread_kill(main, signal.SIGTERM)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def _printed(folder: Path) -> Iterator[None]:
    from app.distributed.launch.worker import redirect_output

    with redirect_output(folder / "logs" / "rank0.log"):
        yield


def _code(end: BaseException) -> int | str | None:
    if isinstance(end, TrainingInterrupted):
        return end.code
    return end.code if isinstance(end, SystemExit) else EXIT_INTERRUPTED
