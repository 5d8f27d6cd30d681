"""Whether OpenMP threads that wait for work keep their core busy or sleep."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

SET_BY_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
TASKS = Path("/proc/self/task")
CHECK_SECONDS = 0.5
BUSY_SHARE = 0.2  # of the time, in which threads of this process wait for a core
SLEEP_SECONDS = 5.0  # how long threads sleep after other processes last needed the cores


@contextmanager
def adaptive_wait_policy() -> Iterator[bool]:
    """Let waiting OpenMP threads sleep inside the `with` block while the machine is busy.

    GNU OpenMP lets them spin for 10 ms, which is fastest while each has a core. If another process
    takes one, they spin where the thread that they wait for could run, and a training of small
    operations takes up to fifty times as long. Which thread computes what never changes, so results
    are the same.

    Yields:
        Whether the policy adapts: not with another OpenMP library or system, nor if there are no
        threads that wait, or an environment variable sets the policy.
    """
    libgomp = _find_libgomp()
    is_set = any(name in os.environ for name in SET_BY_USER)
    if libgomp is None or is_set or torch.get_num_threads() == 1:
        yield False
        return
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(libgomp, done), name="wait policy", daemon=True)
    thread.start()
    try:
        yield True
    finally:
        done.set()
        thread.join()


def _find_libgomp() -> ctypes.CDLL | None:
    """Return the GNU OpenMP that torch uses; None if it uses another one, or not on Linux."""
    if not (TASKS / str(os.getpid()) / "schedstat").exists():
        return None
    library = ctypes.CDLL(torch._C.__file__)
    # LLVM's and Intel's libraries have the first function, too, but share cores by themselves.
    is_gnu = hasattr(library, "GOMP_parallel") and not hasattr(library, "kmp_set_blocktime")
    return library if is_gnu else None


def _watch(libgomp: ctypes.CDLL, done: threading.Event) -> None:
    meter = WaitMeter()
    while not done.wait(CHECK_SECONDS):
        if meter.share() > BUSY_SHARE:
            # In a thread of its own, with which the team ends.
            team = threading.Thread(target=_hold_team, args=(libgomp, done, meter), daemon=True)
            team.start()
            team.join()


def _hold_team(libgomp: ctypes.CDLL, done: threading.Event, meter: WaitMeter) -> None:
    """Keep another team of threads, which sleep, until the machine is no longer busy.

    While a process has more OpenMP threads than it may use cores, those that wait spin for a few
    microseconds only; see GOMP_SPINCOUNT in the manual of GNU OpenMP.
    """
    do_nothing = ctypes.CDLL(None).free  # with a null pointer
    libgomp.GOMP_parallel(do_nothing, None, len(os.sched_getaffinity(0)) + 1, 0)
    end = time.monotonic() + SLEEP_SECONDS
    while time.monotonic() < end and not done.wait(CHECK_SECONDS):
        if meter.share() > BUSY_SHARE:
            end = time.monotonic() + SLEEP_SECONDS


class WaitMeter:
    """Measures how long the threads of this process could run but had no core."""

    def __init__(self) -> None:
        self.time, self.waited = time.monotonic(), _seconds_waited()

    def share(self) -> float:
        """Return the seconds per second since the last call, summed over threads."""
        now, waited = time.monotonic(), _seconds_waited()
        share = (waited - self.waited) / (now - self.time)
        self.time, self.waited = now, waited
        return share


def _seconds_waited() -> float:
    nanoseconds = 0
    for task in TASKS.iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            nanoseconds += int((task / "schedstat").read_text().split()[1])
    return nanoseconds / 1e9
