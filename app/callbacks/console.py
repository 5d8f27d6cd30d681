"""Log a results table, the timing and the best value after each epoch."""

from __future__ import annotations

import logging
from datetime import datetime, timedelta

import pandas as pd

from app.training.accumulator import StageResult
from app.training.events import Callback, EpochEnd
from app.training.history import History, best_epoch, epochs_since_best, point_of, summary_table

log = logging.getLogger(__name__)


class Console(Callback):
    """Log the results of each epoch."""

    def on_stage_end(self, result: StageResult, history: History) -> None:
        if result.stage == "test":
            log.info("%s", _format_rows(history[-1:]))

    def on_epoch_end(self, end: EpochEnd) -> None:
        rows = [row for row in end.history if point_of(row) == end.point]
        log.info("%s", _format_rows(rows))
        log.info("elapsed %s%s", format_duration(end.elapsed), _format_remaining(end))
        best = best_epoch(end.history, end.goal)
        if best is None:
            log.info("best %s: none yet", end.goal.metric)
            return
        patience = _format_patience(end)
        log.info("best %s %.6g in %s%s", end.goal.metric, best.value, best.point, patience)


def _format_rows(rows: History) -> str:
    table: pd.DataFrame = summary_table(rows).dropna(axis="columns", how="all")
    return table.to_string(index=False, float_format=lambda x: f"{x:.5g}", na_rep="")


def format_duration(seconds: float) -> str:
    """Return seconds as `H:MM:SS`."""
    return str(timedelta(seconds=round(seconds)))


def _format_remaining(end: EpochEnd) -> str:
    if end.seconds_left is None:
        return ""
    end_time = datetime.now() + timedelta(seconds=end.seconds_left)
    remaining = format_duration(end.seconds_left)
    return f", remaining {remaining}, expected end {end_time:%Y-%m-%d %H:%M:%S}"


def _format_patience(end: EpochEnd) -> str:
    if end.goal.patience is None:
        return ""
    return f", patience {epochs_since_best(end.history, end.goal)} of {end.goal.patience}"
