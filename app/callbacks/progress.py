"""Show the progress of the current stage."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from app.callbacks.console import format_duration
from app.training.accumulator import StageResult
from app.training.events import Callback, StageStart, StepEnd
from app.training.history import History

log = logging.getLogger(__name__)
NOT_SHOWN = {"total_correct"}
WAITING_SHARE = 0.3  # of the time of a stage, from which on it is said that data is waited for


class Progress(Callback):
    """Show a progress bar on a terminal; elsewhere, log a line at intervals.

    Both have the epoch, the loss and the metrics so far, the learning rate, samples/s and the time
    left of the stage and of the training. Loss and metrics are behind by some steps, since reading
    current values would wait for the device.

    Args:
        seconds_between_lines: Interval of the log lines when stderr is not a terminal.
    """

    def __init__(self, seconds_between_lines: float = 30.0) -> None:
        self.seconds_between_lines = seconds_between_lines
        self.bar: tqdm[Any] | None = None
        self.says_waiting = True

    def on_stage_start(self, start: StageStart) -> None:
        self._close_bar()
        self.start, self.start_time = start, time.monotonic()
        self.num_samples = self.num_skipped = 0
        self.next_line_time = self.start_time + self.seconds_between_lines
        self.shown: object = None
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=start.num_samples,
                desc=describe_stage(start),
                unit=" samples",
                unit_scale=True,
                leave=False,
                dynamic_ncols=True,
            )

    def on_step_end(self, step: StepEnd) -> None:
        if not self.num_samples and step.step > 1:  # a part of the epoch was trained on before
            self.num_skipped = (step.step - 1) * step.num_samples
        total, previous = self.start.num_samples, self.num_samples
        self.num_samples = max(self.num_samples, self.num_skipped) + step.num_samples
        self.num_samples = self.num_samples if total is None else min(self.num_samples, total)
        if self.bar is not None:
            if step.so_far is not self.shown:  # there are new values
                self.shown = step.so_far
                self.bar.set_postfix_str(", ".join(values_to_show(step)), refresh=False)
            self.bar.update(self.num_samples - previous)
        elif time.monotonic() >= self.next_line_time:
            self.next_line_time = time.monotonic() + self.seconds_between_lines
            self._log_line(step)

    def _log_line(self, step: StepEnd) -> None:
        total, seconds = self.start.num_samples, time.monotonic() - self.start_time
        speed = (self.num_samples - self.num_skipped) / seconds
        parts = [
            f"{self.num_samples:,} of {'unknown' if total is None else f'{total:,}'} samples",
            f"{speed:.0f} samples/s",
            *values_to_show(step),
        ]
        if total is not None and speed:
            left = format_duration((total - self.num_samples) / speed)
            parts.append(f"{self.start.stage} left {left}")
        log.info("%s: %s", describe_stage(self.start), ", ".join(parts))

    def on_stage_end(self, result: StageResult, history: History) -> None:  # noqa: ARG002
        self._close_bar()
        if self.says_waiting and result.stage == "train":
            waiting, seconds = result.steps["data_time"].sum(), result.steps["iter_time"].sum()
            if waiting > WAITING_SHARE * seconds:
                self.says_waiting = False
                log.info(
                    "%.0f %% of the time of epoch %d was spent waiting for data (data_time in "
                    "epoch_details); more data.loader.num_workers, or data.cache for pictures, "
                    "load it faster",
                    100 * waiting / seconds,
                    result.epoch,
                )

    def on_run_end(self, history: History) -> None:  # noqa: ARG002
        self._close_bar()

    def _close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def describe_stage(start: StageStart) -> str:
    """Return a stage as text: `epoch 3/10 train`."""
    of_all = "" if start.num_epochs is None else f"/{start.num_epochs}"
    return f"epoch {start.epoch}{of_all} {start.stage}"


def values_to_show(step: StepEnd) -> Iterator[str]:
    """Yield the loss and metrics so far, the learning rate, and the time left of the training."""
    for name, value in (*step.so_far.items(), *step.lrs.items()):
        if name not in NOT_SHOWN:
            yield f"{name} {value:.4g}"
    if step.seconds_left is not None:
        yield f"run left {format_duration(step.seconds_left)}"
