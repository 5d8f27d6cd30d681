"""How far the stage under way is."""

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


class Progress(Callback):
    """On a terminal a bar in samples/s; elsewhere a line now and then.

    The bar shows the last result of the same stage, since reading the current one would make the
    device wait.

    Args:
        seconds_between_lines: Where there is no terminal.
    """

    def __init__(self, seconds_between_lines: float = 30.0) -> None:
        self.seconds = seconds_between_lines
        self.bar: tqdm[Any] | None = None
        self.last: dict[str, str] = {}

    def on_stage_start(self, start: StageStart) -> None:
        self.start, self.began, self.done = start, time.monotonic(), 0
        self.next_line = self.began + self.seconds
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=start.num_samples,
                desc=f"epoch {start.epoch} {start.stage}",
                unit=" samples",
                unit_scale=True,
                leave=False,
                dynamic_ncols=True,
                postfix=self.last.get(start.stage),
            )

    def on_step_end(self, step: StepEnd) -> None:
        total = self.start.num_samples
        before, self.done = self.done, self.done + step.num_samples
        self.done = self.done if total is None else min(self.done, total)
        if self.bar is not None:
            self.bar.update(self.done - before)
            return
        if time.monotonic() >= self.next_line:
            self.next_line += self.seconds
            rate = self.done / (time.monotonic() - self.began)
            log.info(
                "epoch %d %s: %d of %s samples, %.0f samples/s",
                self.start.epoch,
                self.start.stage,
                self.done,
                "unknown" if self.start.num_samples is None else self.start.num_samples,
                rate,
            )

    def on_stage_end(self, result: StageResult, history: History) -> None:  # noqa: ARG002
        self._close()
        shown = {
            k: v for k, v in result.row.items() if isinstance(v, float) and k in _shown(result)
        }
        self.last[result.stage] = ", ".join(f"last {k} {v:.4g}" for k, v in shown.items())

    def on_run_end(self, history: History) -> None:  # noqa: ARG002
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _shown(result: StageResult) -> set[str]:
    hidden = {"loss_std", "epoch_time", "samples/s", "total_correct"}
    return set(result.row) - hidden
