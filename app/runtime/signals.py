"""Stop a run early, on a signal or when its time limit is reached."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType
from typing import Literal

log = logging.getLogger(__name__)
EXIT_FAILURE, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130
# A signal to the process group also arrives from the parent, which passes it on: within this many
# seconds, both count as one.
DUPLICATE_SIGNAL_SECONDS = 0.5


class StopReason(IntEnum):
    """Why a run stops early; if ranks have different reasons, the largest one counts."""

    NONE = 0
    CALLBACK = 1
    TIME = 2
    PREEMPTED = 3
    INTERRUPTED = 4


REASON_BY_SIGNAL = {
    "SIGINT": StopReason.INTERRUPTED,
    "SIGTERM": StopReason.PREEMPTED,
    "SIGUSR1": StopReason.PREEMPTED,
}
STATUS_BY_REASON: dict[StopReason, Literal["preempted", "interrupted"]] = {
    StopReason.PREEMPTED: "preempted",
    StopReason.INTERRUPTED: "interrupted",
}
SIGNAL_BY_REASON = {
    StopReason.PREEMPTED: signal.SIGTERM,
    StopReason.INTERRUPTED: signal.SIGINT,
}
EXIT_CODE_BY_REASON = {StopReason.PREEMPTED: 143, StopReason.INTERRUPTED: 130}


class TrainingInterrupted(BaseException):
    """The run has stopped as requested by a signal. Not an error, as with `KeyboardInterrupt`."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(STATUS_BY_REASON[reason])
        self.reason = reason

    @property
    def status(self) -> Literal["preempted", "interrupted"]:
        """Status for `status.json`."""
        return STATUS_BY_REASON[self.reason]

    @property
    def exit_code(self) -> int:
        """Exit code of the process."""
        return EXIT_CODE_BY_REASON[self.reason]


class StopSignal:
    """Receives requests to stop: raises at once, is polled after each step, or forwards them.

    Args:
        handles_second_interrupt: Raise `KeyboardInterrupt` on a second Ctrl-C. False for ranks
            whose parent process handles it.
        forward: Passes a request on to processes that do the work; None if this process does it.

    Attributes:
        requested: Strongest reason to stop so far.
    """

    def __init__(
        self,
        handles_second_interrupt: bool = True,
        forward: Callable[[StopReason], None] | None = None,
    ) -> None:
        self.handles_second_interrupt, self.forward = handles_second_interrupt, forward
        self.requested = StopReason.NONE
        self.last_signal_at = 0.0
        self.is_deferred = forward is not None
        self.deadline: float | None = None
        self.pid = os.getpid()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle signals inside the context."""
        with signal_handlers(self._on_signal):
            yield

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside the context, only record requests; raise them at its end."""
        before, self.is_deferred = self.is_deferred, True
        try:
            yield
        finally:
            self.is_deferred = before
        if self.requested and not before:
            raise TrainingInterrupted(self.requested)

    @contextmanager
    def deferred_until_step(self, seconds: float | None = None) -> Iterator[None]:
        """Inside the context, only record requests, for `reason` to return after each step.

        Args:
            seconds: Time limit from now; None for no limit.
        """
        before = self.is_deferred, self.deadline
        if seconds is not None:
            self.deadline = time.monotonic() + seconds
        self.is_deferred = True
        try:
            yield
        finally:
            self.is_deferred, self.deadline = before

    def reason(self) -> StopReason:
        """Return why to stop now, or `NONE`."""
        if self.requested or self.deadline is None or time.monotonic() < self.deadline:
            return self.requested
        return StopReason.TIME

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if os.getpid() != self.pid:
            return  # a forked data loader worker, which ends with its parent
        reason, now = REASON_BY_SIGNAL[signal.Signals(number).name], time.monotonic()
        is_recent = now - self.last_signal_at < DUPLICATE_SIGNAL_SECONDS
        is_repeated, is_first = self.requested == reason, not self.requested
        self.requested = max(self.requested, reason)
        self.last_signal_at = now
        if is_repeated and is_recent:
            return
        if not self.is_deferred:
            raise TrainingInterrupted(reason)
        if is_repeated and reason is StopReason.INTERRUPTED and self.handles_second_interrupt:
            raise KeyboardInterrupt
        if self.forward is not None:
            self.forward(reason)
        if is_first and self.handles_second_interrupt:
            is_interrupt = reason is StopReason.INTERRUPTED
            hint = "; press Ctrl-C again to stop at once" if is_interrupt else ""
            sys.stderr.write(f"\nstopping after the current step{hint}\n")


@contextmanager
def signal_handlers(
    handler: Callable[[int, FrameType | None], None], names: Iterable[str] = REASON_BY_SIGNAL
) -> Iterator[None]:
    """Install a handler for signals, by default those that ask to stop, except for ignored ones.

    Does nothing outside the main thread, where Python does not deliver signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
