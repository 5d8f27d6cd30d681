"""The table after each epoch, the times, the best so far."""

from __future__ import annotations

import logging
from datetime import datetime, timedelta

import pandas as pd

from app.training.accumulator import StageResult
from app.training.events import Callback, EpochEnd
from app.training.history import History, best_epoch, epochs_since_best, seconds_left, summary_table

log = logging.getLogger(__name__)


class Console(Callback):
    """Says in the log what each epoch came to."""

    def on_stage_end(self, result: StageResult, history: History) -> None:
        if result.stage == "test":
            log.info("%s", _table(history[-1:]))

    def on_epoch_end(self, end: EpochEnd) -> None:
        rows = [row for row in end.history if row["epoch"] == end.epoch]
        log.info("%s", _table(rows))
        log.info("elapsed %s%s", _clock(end.elapsed), _remaining(end))
        found = best_epoch(end.history, end.goal)
        if found is None:
            log.info("best %s: none yet", end.goal.metric)
            return
        log.info(
            "best %s %.6g in epoch %d%s", end.goal.metric, found.value, found.epoch, _patience(end)
        )


def _remaining(end: EpochEnd) -> str:
    if end.epochs_left is None:
        return ""
    left = seconds_left(end.history, end.epochs_left, end.valid_every)
    expected = (datetime.now() + timedelta(seconds=left)).strftime("%Y-%m-%d %H:%M:%S")
    return f", remaining {_clock(left)}, expected end {expected}"


def _patience(end: EpochEnd) -> str:
    if end.goal.patience is None:
        return ""
    return f", early stop {epochs_since_best(end.history, end.goal)} of {end.goal.patience}"


def _table(rows: History) -> str:
    table: pd.DataFrame = summary_table(rows).dropna(axis="columns", how="all")
    return table.to_string(index=False, float_format=lambda x: f"{x:.5g}", na_rep="")


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
