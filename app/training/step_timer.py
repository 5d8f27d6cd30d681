"""Time that steps take, measured without waiting for the device."""

from __future__ import annotations

import time

import torch

Timestamp = float | torch.cuda.Event


class StepTimer:
    """Measures the duration of each step without synchronizing the device.

    On a CUDA device these are the times between events in the stream, which are only read when the
    stage ends.

    Args:
        device: Device that the steps run on.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.started = time.perf_counter()
        self.ticks = [self._timestamp()]
        self.earlier_times: list[float] = []  # of the steps before the run was resumed
        self.earlier_elapsed = 0.0

    def tick(self) -> None:
        """Mark the end of a step."""
        self.ticks.append(self._timestamp())

    def step_times(self) -> list[float]:
        """Return the seconds of each step; only call this once the device has finished."""
        pairs = zip(self.ticks[:-1], self.ticks[1:], strict=True)
        return [*self.earlier_times, *(_seconds_between(a, b) for a, b in pairs)]

    def elapsed(self) -> float:
        """Return the seconds since the stage started, without the time between two runs."""
        return self.earlier_elapsed + time.perf_counter() - self.started

    def _timestamp(self) -> Timestamp:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds_between(start: Timestamp, end: Timestamp) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert isinstance(start, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    return float(start.elapsed_time(end)) / 1000
