"""Show the progress of the current stage."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from tqdm import tqdm

from app.training.accumulator import StageResult
from app.training.events import Callback, StageStart, StepEnd
from app.training.history import History

log = logging.getLogger(__name__)
NOT_SHOWN = {"loss_std", "epoch_time", "samples/s", "total_correct"}


class Progress(Callback):
    """Show a progress bar in samples/s on a terminal; elsewhere, log a line at intervals.

    The bar shows the previous result of the same stage, since reading current values would
    synchronize with the device.

    Args:
        seconds_between_lines: Interval of the log lines when stderr is not a terminal.
    """

    def __init__(self, seconds_between_lines: float = 30.0) -> None:
        self.seconds_between_lines = seconds_between_lines
        self.bar: tqdm[Any] | None = None
        self.last_results: dict[str, str] = {}

    def on_stage_start(self, start: StageStart) -> None:
        self.start, self.start_time, self.num_samples = start, time.monotonic(), 0
        self.next_line_time = self.start_time + self.seconds_between_lines
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=start.num_samples,
                desc=f"epoch {start.epoch} {start.stage}",
                unit=" samples",
                unit_scale=True,
                leave=False,
                dynamic_ncols=True,
                postfix=self.last_results.get(start.stage),
            )

    def on_step_end(self, step: StepEnd) -> None:
        total = self.start.num_samples
        previous, self.num_samples = self.num_samples, self.num_samples + step.num_samples
        self.num_samples = self.num_samples if total is None else min(self.num_samples, total)
        if self.bar is not None:
            self.bar.update(self.num_samples - previous)
            return
        if time.monotonic() >= self.next_line_time:
            self.next_line_time += self.seconds_between_lines
            log.info(
                "epoch %d %s: %d of %s samples, %.0f samples/s",
                self.start.epoch,
                self.start.stage,
                self.num_samples,
                "unknown" if total is None else total,
                self.num_samples / (time.monotonic() - self.start_time),
            )

    def on_stage_end(self, result: StageResult, history: History) -> None:  # noqa: ARG002
        self._close_bar()
        shown = {
            name: value
            for name, value in result.row.items()
            if isinstance(value, float) and name not in NOT_SHOWN
        }
        self.last_results[result.stage] = ", ".join(f"last {k} {v:.4g}" for k, v in shown.items())

    def on_run_end(self, history: History) -> None:  # noqa: ARG002
        self._close_bar()

    def _close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
