"""Profile a few training steps: which operators take the time."""

from __future__ import annotations

import logging
from pathlib import Path

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile

from app.runtime.files import write_csv
from app.runtime.folders import make_folder
from app.training.events import Callback, StageStart, StepEnd
from app.training.history import History

log = logging.getLogger(__name__)
MAX_SKIPPED = 10  # first steps of the training, which compile, choose kernels and fill caches
MAX_LOGGED_ROWS = 10


class Profiler(Callback):
    """Profile training steps of the first epoch, with all that is between them.

    Writes `profile/trace.json`, for https://ui.perfetto.dev or `chrome://tracing`, and
    `profile/operators.csv`, whose first rows are in the log: times in milliseconds, the slowest
    operator first. `self` is the time without the operators that it calls.

    Args:
        folder: Run folder.
        steps: Number of steps to profile. The first ones of the epoch (10, or what the epoch can
            spare) are not.

    Raises:
        ValueError: `steps` is less than 1.
    """

    def __init__(self, folder: Path, steps: int = 10) -> None:
        if steps < 1:
            raise ValueError(f"steps={steps}; allowed: 1 or more")
        self.folder, self.steps = folder / "profile", steps
        self.num_skipped = MAX_SKIPPED
        self.is_waiting, self.num_seen = True, 0
        self.profile: profile | None = None

    def on_stage_start(self, start: StageStart) -> None:
        if start.num_batches is not None:
            self.num_skipped = max(1, min(MAX_SKIPPED, start.num_batches - self.steps))
        self.num_seen = 0

    def on_step_end(self, step: StepEnd) -> None:
        if not self.is_waiting or step.stage != "train":
            return
        self.num_seen += 1
        if self.num_seen == self.num_skipped and self.profile is None:
            self.profile = profile(activities=_activities(), record_shapes=True)
            self.profile.start()
        elif self.num_seen == self.num_skipped + self.steps:
            self._finish()

    def on_run_end(self, history: History) -> None:  # noqa: ARG002
        """Write what there is of a training that is shorter."""
        if self.profile is not None and self.is_waiting:
            self._finish()

    def _finish(self) -> None:
        assert self.profile is not None
        self.is_waiting = False
        self.profile.stop()
        make_folder(self.folder)
        trace = self.folder / "trace.json"
        self.profile.export_chrome_trace(str(trace))
        operators = operator_table(self.profile)
        write_csv(self.folder / "operators.csv", operators)
        text = operators.head(MAX_LOGGED_ROWS).to_string(index=False, float_format="%.3f")
        log.info("profile of %d steps, in %s:\n%s", self.steps, self.folder, text)


def operator_table(profiled: profile) -> pd.DataFrame:
    """Return a row for each operator, the slowest first; times are in milliseconds."""
    rows = [
        {
            "operator": event.key,
            "calls": event.count,
            "self_cpu_ms": event.self_cpu_time_total / 1000,
            "cpu_ms": event.cpu_time_total / 1000,
            "self_device_ms": event.self_device_time_total / 1000,
            "device_ms": event.device_time_total / 1000,
        }
        for event in profiled.key_averages()
    ]
    table = pd.DataFrame(rows)
    by = "self_device_ms" if table["self_device_ms"].any() else "self_cpu_ms"
    return table.sort_values(by, ascending=False, ignore_index=True)


def _activities() -> list[ProfilerActivity]:
    cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return [ProfilerActivity.CPU, *cuda]
