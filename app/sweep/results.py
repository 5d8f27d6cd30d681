"""What runs have come to: a table of them, and their curves."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from app.config.schema import Monitor


@dataclass(frozen=True)
class Results:
    """What the table, the pictures and the page are made of.

    Attributes:
        title: Of the page, as the name of the sweep's folder.
        table: A line for each run, as in `sweep.csv`; without a value where a run has none yet.
        keys: The columns of the table that were swept, or that differ.
        goals: What the runs were to reach, the most frequent first; their columns are
            `best_<metric>` and `last_<metric>`.
        curves: By the table's column `folder`: a run's summary table (epoch, stage, loss_mean,
            accuracy, ...), a line for each finished stage.
    """

    title: str
    table: pd.DataFrame
    keys: list[str]
    goals: list[Monitor]
    curves: dict[str, pd.DataFrame]
