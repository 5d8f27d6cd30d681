"""Say once in the log that training has become much slower."""

from __future__ import annotations

import logging
import os
from collections import deque
from statistics import median

import pandas as pd

from app.training.accumulator import LoggedSteps, StageResult
from app.training.events import Callback, StageStart
from app.training.history import History

log = logging.getLogger(__name__)
SLOW_SHARE = 1 / 3  # of the median speed of the run
MIN_BLOCKS = 5  # of steps that are compared with
MAX_BLOCKS = 1000
WAITING_SHARE = 0.5  # of the time of a step, from which on the data is the reason


class Slowdown(Callback):
    """Warn once per run if samples/s of training fall below a third of their median.

    A block of steps, as it arrives on the host, is compared with those before it. Its speed is that
    of the median step, so that a checkpoint, a validation or the start of data workers between two
    steps does not count.
    """

    def __init__(self) -> None:
        self.speeds: deque[float] = deque(maxlen=MAX_BLOCKS)
        self.num_steps = 0  # of the stage, that were compared
        self.has_warned = False

    def on_stage_start(self, start: StageStart) -> None:  # noqa: ARG002
        self.num_steps = 0

    def on_steps_logged(self, logged: LoggedSteps) -> None:
        if logged.stage == "train":
            self._compare(logged.epoch, logged.steps)

    def on_stage_end(self, result: StageResult, history: History) -> None:  # noqa: ARG002
        if result.stage == "train":
            self._compare(result.epoch, result.steps[result.steps["iter"] > self.num_steps])

    def _compare(self, epoch: int, steps: pd.DataFrame) -> None:
        """Compare steps with those before, and warn if they are slow.

        Args:
            epoch: Their epoch.
            steps: Table of steps that were not compared yet.
        """
        self.num_steps += len(steps)
        counted = steps[(steps["num_samples"] > 0) & (steps["iter_time"] > 0)]
        if self.has_warned or counted.empty:
            return
        speed = float((counted["num_samples"] / counted["iter_time"]).median())
        if len(self.speeds) >= MIN_BLOCKS and speed < SLOW_SHARE * (usual := median(self.speeds)):
            self.has_warned = True
            waiting = float((counted["data_time"] / counted["iter_time"]).median())
            log.warning("%s", describe_slowdown(epoch, speed, usual, waiting))
        self.speeds.append(speed)


def describe_slowdown(epoch: int, speed: float, usual: float, waiting: float) -> str:
    """Return what is slow, how busy the machine is, and what to do.

    Args:
        epoch: Epoch that is trained.
        speed: Samples per second now.
        usual: Median samples per second of the run.
        waiting: Share of the time of a step in which it waits for data.
    """
    cores, load = os.cpu_count() or 1, _load_average()
    if waiting > WAITING_SHARE:
        advice = f"{waiting:.0%} of it is waiting for data: see whether its storage is busy"
    elif load is not None and load > cores:
        advice = "other processes may need the cores: end or move them (top lists them)"
    else:
        advice = "see whether other processes use the device, or heat or a power limit slows it"
    state = "" if load is None else f"; load average {load:.1f} on {cores} cores"
    return (
        f"epoch {epoch}: training slowed down to {speed:,.0f} samples/s, the median of this run is "
        f"{usual:,.0f}{state}; {advice}"
    )


def _load_average() -> float | None:
    """Return the load of the last minute; None on Windows."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
