"""Log the parts of the model, and write all of them to a file."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from app.runtime.files import write_csv
from app.training.events import Callback, StageStart
from app.training.model_summary import ModuleRow, Summary

log = logging.getLogger(__name__)
FILE = "model_summary.csv"
ALL = -1
MAX_LOGGED_ROWS = 40


class ModelSummary(Callback):
    """Log a table of the model's modules when training starts, and write `model_summary.csv`.

    Args:
        folder: Run folder.
        config: Resolved configuration.
        summarize: Measures the model.
        max_depth: How many levels of modules the log shows; 0 shows the totals only, -1 all
            levels. The file has all.

    Raises:
        ValueError: `max_depth` is less than -1.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        summarize: Callable[[], Summary],
        max_depth: int = 1,
    ) -> None:
        if max_depth < ALL:
            raise ValueError(f"max_depth={max_depth}; allowed: -1 (all), 0 (totals), 1, 2, ...")
        self.folder, self.max_depth = folder, max_depth
        # Measured now, because a strategy for several devices may cut the weights into parts.
        self.summary = summarize() if config["mode"] == "train" else None

    def on_stage_start(self, start: StageStart) -> None:
        if self.summary is None or start.stage != "train":
            return
        write_csv(self.folder / FILE, _table(self.summary.rows))
        log.info("%s", describe(self.summary, self.max_depth))
        self.summary = None  # once


def _table(rows: list[ModuleRow]) -> pd.DataFrame:
    return pd.DataFrame([asdict(row) for row in rows]).rename(columns={"name": "module"})


def describe(summary: Summary, max_depth: int) -> str:
    """Return a table of the modules to a depth, and the totals."""
    total = summary.rows[0]
    shown = [row for row in summary.rows[1:] if max_depth == ALL or row.depth <= max_depth]
    lines = []
    if shown:
        lines.append(_format_rows(shown[:MAX_LOGGED_ROWS]))
    if len(shown) > MAX_LOGGED_ROWS:
        lines.append(f"... and {len(shown) - MAX_LOGGED_ROWS} more modules, in {FILE}")
    flops = "" if total.flops is None else f", {total.flops:,} FLOPs per sample"
    counts = f"{total.parameters:,} parameters, {total.trainable:,} of them trained"
    lines.append(f"{total.kind}: {counts}{flops}")
    lines.append(
        f"memory: weights {_format_bytes(summary.weight_bytes)}, "
        f"gradients {_format_bytes(summary.gradient_bytes)}, "
        f"state of the optimizer {_format_bytes(summary.optimizer_bytes)}"
    )
    if summary.problem is not None:
        lines.append(f"no output shapes and FLOPs: one sample cannot pass: {summary.problem}")
    return "\n".join(lines)


def _format_rows(rows: list[ModuleRow]) -> str:
    table = pd.DataFrame(
        {
            "module": [row.name for row in rows],
            "type": [row.kind for row in rows],
            "output shape": [row.output_shape for row in rows],
            "parameters": [f"{row.parameters:,}" for row in rows],
            "trained": [f"{row.trainable:,}" for row in rows],
            "FLOPs": ["" if row.flops is None else f"{row.flops:,}" for row in rows],
        }
    )
    return table.to_string(index=False)


def _format_bytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:,.1f} MiB"
