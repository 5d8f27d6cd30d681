"""Requests to stop."""

from __future__ import annotations

import signal

import pytest

from app.runtime import signals
from app.runtime.signals import StopReason, StopSignal, TrainingInterrupted


def test_stop_signal_not_deferred_raises_at_once() -> None:
    with StopSignal().installed(), pytest.raises(TrainingInterrupted, match="preempted"):
        signal.raise_signal(signal.SIGTERM)


def test_stop_signal_deferred_raises_at_end() -> None:
    stop, steps = StopSignal(), []
    with stop.installed(), pytest.raises(TrainingInterrupted, match="preempted"):
        with stop.deferred():
            signal.raise_signal(signal.SIGTERM)
            steps.append("inside")
        steps.append("after")
    assert steps == ["inside"]


def test_stop_signal_deferred_until_step_keeps_strongest_reason() -> None:
    stop = StopSignal(handles_second_interrupt=False)
    with stop.installed(), stop.deferred_until_step():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.reason() is StopReason.INTERRUPTED


def test_stop_signal_forward_passes_on_requests_until_second_ctrl_c(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forwarded: list[StopReason] = []
    stop = StopSignal(forward=forwarded.append)
    with stop.installed():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the same one, sent to the process group
        signal.raise_signal(signal.SIGTERM)
        assert forwarded == [StopReason.INTERRUPTED, StopReason.PREEMPTED]
        monkeypatch.setattr(signals, "DUPLICATE_SIGNAL_SECONDS", 0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert len(forwarded) == 2
    assert capsys.readouterr().err.count("stopping after the current step; press Ctrl-C") == 1
