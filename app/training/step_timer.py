"""Time that steps take, measured without waiting for the device."""

from __future__ import annotations

import time
from collections import deque

import torch

Timestamp = float | torch.cuda.Event


class StepTimer:
    """Measures the duration of each step without synchronizing the device.

    On a CUDA device these are the times between events in the stream, which are only read once the
    device has finished the steps.

    Args:
        device: Device that the steps run on.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.started = time.perf_counter()
        self.ticks = deque([self._timestamp()])
        self.known_times: list[float] = []
        self.earlier_elapsed = 0.0  # before the run was resumed

    def tick(self) -> None:
        """Mark the end of a step."""
        self.ticks.append(self._timestamp())

    def step_times(self, start: int = 0, end: int | None = None) -> list[float]:
        """Return the seconds of each step; only call this once the device has finished them.

        Args:
            start: Index of the first step.
            end: Index after the last one; None is all steps so far.
        """
        unknown = len(self.ticks) - 1 if end is None else end - len(self.known_times)
        for _ in range(unknown):
            begin = self.ticks.popleft()
            self.known_times.append(_seconds_between(begin, self.ticks[0]))
        return self.known_times[start:end]

    def elapsed(self) -> float:
        """Return the seconds since the stage started, without the time between two runs."""
        return self.earlier_elapsed + time.perf_counter() - self.started

    def resume(self, step_times: list[float], elapsed: float) -> None:
        """Continue a stage that was interrupted after these step times and seconds."""
        self.known_times, self.earlier_elapsed = step_times, elapsed

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
