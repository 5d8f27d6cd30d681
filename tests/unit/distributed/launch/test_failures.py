"""Root cause of rank failures."""

from __future__ import annotations

import io
import logging
from typing import Any

from app.distributed.launch.failures import RankFailure, root_exception, root_failure
from app.runtime.signals import StopReason, TrainingInterrupted


def test_root_failure_returns_cause_of_lost_connections_and_timeouts() -> None:
    lost = RankFailure(0, "lost", "connection lost", timestamp=1.0)
    timeout = RankFailure(0, "timeout", "timed out", "trace", timestamp=2.0)
    error = RankFailure(2, "error", "error", timestamp=2.5)
    died = RankFailure(1, "died", "killed", timestamp=3.0)
    assert root_failure([lost, died, error], 3, 9) is error
    assert root_failure([lost, died], 3, 9) is died
    unresponsive = root_failure([lost, timeout], 3, 9)
    assert (unresponsive.rank, unresponsive.trace) == (1, "trace")
    assert root_failure([lost], 1, 9) is lost
    assert root_failure([lost], 2, 9).rank == 1


def test_root_exception_signal_during_failure_returns_failure() -> None:
    error = OSError("the disk failed")
    try:
        try:
            raise error
        finally:
            raise TrainingInterrupted(StopReason.PREEMPTED)
    except TrainingInterrupted as interrupt:
        assert root_exception(interrupt) is error
    interrupt_alone = TrainingInterrupted(StopReason.PREEMPTED)
    assert root_exception(interrupt_alone) is interrupt_alone


def test_root_exception_signal_while_library_handles_error_returns_signal() -> None:
    class InterruptedHandler(logging.StreamHandler[Any]):
        def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802
            raise TrainingInterrupted(StopReason.PREEMPTED)

    closed = io.StringIO()
    closed.close()
    try:
        InterruptedHandler(closed).emit(logging.makeLogRecord({}))
    except TrainingInterrupted as interrupt:
        assert isinstance(interrupt.__context__, ValueError)
        assert root_exception(interrupt) is interrupt
