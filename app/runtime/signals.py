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
EXIT_FAILURE, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130  # exit codes
SAME_SIGNAL_SECONDS = 0.5  # seconds in which two signals are one, sent to the group and passed on


class StopReason(IntEnum):
    """Why a run ends before its time; ranks go by the largest."""

    NONE = 0
    TIME = 1
    PREEMPTED = 2
    INTERRUPTED = 3


REASON_BY_SIGNAL = {
    "SIGINT": StopReason.INTERRUPTED,
    "SIGTERM": StopReason.PREEMPTED,
    "SIGUSR1": StopReason.PREEMPTED,
}
STATUS_BY_REASON: dict[StopReason, Literal["preempted", "interrupted"]] = {
    StopReason.PREEMPTED: "preempted",
    StopReason.INTERRUPTED: "interrupted",
}
EXIT_CODES = {StopReason.PREEMPTED: 143, StopReason.INTERRUPTED: 130}


class TrainingInterrupted(BaseException):
    """The run has ended as it was asked to; like `KeyboardInterrupt` no error.

    Args:
        reason: `PREEMPTED` or `INTERRUPTED`.
    """

    def __init__(self, reason: StopReason) -> None:
        super().__init__(STATUS_BY_REASON[reason])
        self.reason = reason

    @property
    def state(self) -> Literal["preempted", "interrupted"]:
        """As in `status.json`."""
        return STATUS_BY_REASON[self.reason]

    @property
    def code(self) -> int:
        """The exit code."""
        return EXIT_CODES[self.reason]


@contextmanager
def signal_handlers(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Signals that ask to stop go there meanwhile, but for those that this process is to ignore.

    Only a process's main thread can hear them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    there = [getattr(signal, name) for name in REASON_BY_SIGNAL if hasattr(signal, name)]
    before = {n: signal.getsignal(n) for n in there if signal.getsignal(n) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class StopSignal:
    """Hears of signals: at once where nothing is lost, else at the end of the step.

    Args:
        insists: A second Ctrl-C ends it at once; else somebody above sees to that.
    """

    def __init__(self, insists: bool = True) -> None:
        self.insists = insists
        self.asked = StopReason.NONE
        self.when = 0.0
        self.at_steps = False
        self.deadline: float | None = None
        self.process = os.getpid()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Signals come here meanwhile."""
        with signal_handlers(self._hear):
            yield

    @contextmanager
    def deferred_until_step(self, seconds: float | None = None) -> Iterator[None]:
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

    def reason(self) -> StopReason:
        """Why to stop now; `NONE` where nobody has asked."""
        if self.asked or self.deadline is None or time.monotonic() < self.deadline:
            return self.asked
        return StopReason.TIME

    def _hear(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if os.getpid() != self.process:
            return  # forked from the one that listens: a reader of data ends with it
        reason, now = REASON_BY_SIGNAL[signal.Signals(number).name], time.monotonic()
        soon, again = now - self.when < SAME_SIGNAL_SECONDS, self.asked == reason
        self.asked, first = max(self.asked, reason), not self.asked
        self.when = now
        if again and soon:
            return
        if not self.at_steps:
            raise TrainingInterrupted(reason)
        if again and self.insists and reason is StopReason.INTERRUPTED:
            raise KeyboardInterrupt
        if first and self.insists:
            hint = "; Ctrl-C again ends it at once" if reason is StopReason.INTERRUPTED else ""
            sys.stderr.write(f"\nstopping after this step{hint}\n")
