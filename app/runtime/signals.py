"""What ends a run before its time: a signal, or the clock."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType
from typing import Literal

log = logging.getLogger(__name__)
FAILURE, MISTAKE, INTERRUPTED = 1, 2, 130  # exit codes
AT_ONCE = 0.5  # seconds in which two signals are one, sent to the group and passed on


class Reason(IntEnum):
    """Why a run ends before its time; ranks go by the largest."""

    NONE = 0
    TIME = 1
    PREEMPTED = 2
    INTERRUPTED = 3


REASONS = {
    "SIGINT": Reason.INTERRUPTED,
    "SIGTERM": Reason.PREEMPTED,
    "SIGUSR1": Reason.PREEMPTED,
}
STATES: dict[Reason, Literal["preempted", "interrupted"]] = {
    Reason.PREEMPTED: "preempted",
    Reason.INTERRUPTED: "interrupted",
}
EXIT_CODES = {Reason.PREEMPTED: 143, Reason.INTERRUPTED: 130}


class Stopped(BaseException):
    """The run has ended as it was asked to; like `KeyboardInterrupt` no error.

    Args:
        reason: `PREEMPTED` or `INTERRUPTED`.
    """

    def __init__(self, reason: Reason) -> None:
        super().__init__(STATES[reason])
        self.reason = reason

    @property
    def state(self) -> Literal["preempted", "interrupted"]:
        """As in `status.json`."""
        return STATES[self.reason]

    @property
    def code(self) -> int:
        """The exit code."""
        return EXIT_CODES[self.reason]


@contextmanager
def heard(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Signals that ask to stop go there meanwhile, but for those that this process is to ignore.

    Only a process's main thread can hear them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    there = [getattr(signal, name) for name in REASONS if hasattr(signal, name)]
    before = {n: signal.getsignal(n) for n in there if signal.getsignal(n) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class Stop:
    """Hears of signals: at once where nothing is lost, else at the end of the step.

    Args:
        insists: A second Ctrl-C ends it at once; else somebody above sees to that.
    """

    def __init__(self, insists: bool = True) -> None:
        self.insists = insists
        self.asked = Reason.NONE
        self.when = 0.0
        self.at_steps = False
        self.deadline: float | None = None
        self.process = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals come here meanwhile."""
        with heard(self._hear):
            yield

    @contextmanager
    def between_steps(self, seconds: float | None = None) -> Iterator[None]:
        """Who is asked to stop inside goes on to the end of the step.

        Args:
            seconds: After which the clock asks, too; None where it does not.
        """
        before = self.at_steps, self.deadline
        if seconds is not None:
            self.deadline = time.monotonic() + seconds
        self.at_steps = True
        try:
            yield
        finally:
            self.at_steps, self.deadline = before

    def reason(self) -> Reason:
        """Why to stop now; `NONE` where nobody has asked."""
        if self.asked or self.deadline is None or time.monotonic() < self.deadline:
            return self.asked
        return Reason.TIME

    def _hear(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if os.getpid() != self.process:
            return  # forked from the one that listens: a reader of data ends with it
        reason, now = REASONS[signal.Signals(number).name], time.monotonic()
        soon, again = now - self.when < AT_ONCE, self.asked == reason
        self.asked, first = max(self.asked, reason), not self.asked
        self.when = now
        if again and soon:
            return
        if not self.at_steps:
            raise Stopped(reason)
        if again and self.insists and reason is Reason.INTERRUPTED:
            raise KeyboardInterrupt
        if first and self.insists:
            hint = "; Ctrl-C again ends it at once" if reason is Reason.INTERRUPTED else ""
            sys.stderr.write(f"\nstopping after this step{hint}\n")
