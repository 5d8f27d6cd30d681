"""Accumulation of step values into the tables of a stage.

Each step returns sums that stay on the device. When the stage ends they are stacked, reduced over
ranks and copied to the host once. The values of every iteration and the exact value of the stage
are computed from that same block, so they cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from app.distributed.collectives import broadcast_object, rank
from app.metrics.stage_metrics import StageMetrics
from app.training.history import Row
from app.training.step_timer import StepTimer
from app.training.step_values import StepValues, means, reduce_to_host, zeros_like_row

FLUSH_EVERY = 10_000  # maximum number of steps whose values are kept on the device


class StageAccumulator:
    """Collects the values of all steps of a stage.

    Args:
        metrics: Metrics of the stage; they are reset.
        device: Device that the steps run on.
        pop_invalid_rows: Returns how many of the last steps turned out not to count, since it was
            last called.
    """

    def __init__(
        self,
        metrics: StageMetrics,
        device: torch.device,
        pop_invalid_rows: Callable[[], int] = int,
    ) -> None:
        metrics.reset()
        self.metrics, self.timer = metrics, StepTimer(device)
        self.pop_invalid_rows = pop_invalid_rows
        self.pending: list[StepValues] = []
        self.blocks: list[dict[str, Tensor]] = []
        self.host_values: dict[str, list[float]] = {}

    def add(self, values: StepValues, host_values: Mapping[str, float] | None = None) -> None:
        """Add the values of a step.

        Args:
            values: Averages and sums that are on the device.
            host_values: Further columns that are plain numbers, such as the learning rate.
        """
        self.pending.append(values)
        self.timer.tick()
        for name, number in (host_values or {}).items():
            self.host_values.setdefault(name, []).append(float(number))
        self.mask_last(self.pop_invalid_rows())
        if len(self.pending) == FLUSH_EVERY:
            self.flush()

    @property
    def is_empty(self) -> bool:
        """Whether no step has been added."""
        return not (self.pending or self.blocks)

    def flush(self) -> None:
        """Reduce all pending values over ranks and copy them to the host at once."""
        self.mask_last(self.pop_invalid_rows())
        if self.pending:
            self.blocks.append(reduce_to_host(self.pending))
            self.pending = []

    def mask_last(self, count: int) -> None:
        """Exclude the last `count` steps from the totals; their cells in the table become empty."""
        num_pending = min(count, len(self.pending))
        if num_pending:
            self.pending[-num_pending:] = map(zeros_like_row, self.pending[-num_pending:])
        remaining = count - num_pending
        for block in reversed(self.blocks):  # flushed already
            length = len(next(iter(block.values())))
            masked = min(remaining, length)
            for column in block.values():
                column[length - masked :] = 0
            remaining -= masked

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: tensors and plain values; all ranks must call this."""
        self.flush()
        return {
            "blocks": self.blocks,
            "host_values": {n: _float64(values) for n, values in self.host_values.items()},
            "step_times": _float64(self.timer.step_times()),
            "elapsed": self.timer.elapsed(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.blocks = list(state["blocks"])
        self.host_values = {name: t.tolist() for name, t in state["host_values"].items()}
        self.timer.earlier_times = state["step_times"].tolist()
        self.timer.earlier_elapsed = state["elapsed"]

    def result(self, stage: str, epoch: int) -> StageResult:
        """Compute the result of the stage; all ranks must call this.

        On ranks other than 0 only `row` is set.
        """
        self.flush()
        accumulated = self.metrics.compute_accumulating()
        if rank() > 0:
            return StageResult(stage, epoch, broadcast_object({}), pd.DataFrame(), {})
        result = self._summarize(stage, epoch, accumulated)
        broadcast_object(result.row)
        return result

    def _summarize(
        self, stage: str, epoch: int, accumulated: Mapping[str, np.ndarray]
    ) -> StageResult:
        columns = {n: torch.cat([block[n] for block in self.blocks]) for n in self.blocks[0]}
        steps, totals, arrays = {}, {}, {}
        for name, sums in columns.items():
            metric = self.metrics.sum_metrics.get(name)
            total = sums.sum(0)
            if metric is None:
                steps[name] = means(sums).numpy()
                totals[name] = means(total).item()
            elif (value := self.metrics.value(name, total)).size == 1:
                steps[name] = metric.values(sums)
                totals[name] = value.item()
            else:
                arrays[name] = value
        for name, value in accumulated.items():
            if value.size == 1:
                totals[name] = value.item()
            else:
                arrays[name] = value
        counts = columns["loss"][:, -1].numpy().astype(np.int64)
        table = self._step_table(stage, epoch, counts, steps)
        weights = columns["loss"][:, 1].numpy()
        row = self._summary_row(stage, epoch, counts, weights, steps["loss"], totals)
        return StageResult(stage, epoch, row, table, arrays)

    def _step_table(
        self, stage: str, epoch: int, counts: np.ndarray, steps: dict[str, np.ndarray]
    ) -> pd.DataFrame:
        table = pd.DataFrame(
            {
                "epoch": epoch,
                "iter": np.arange(1, len(counts) + 1),
                "stage": stage,
                "loss": steps["loss"],
                "num_samples": counts,
                **{name: values for name, values in steps.items() if name != "loss"},
            }
        )
        for name, numbers in self.host_values.items():
            table[name] = numbers
        table["iter_time"] = self.timer.step_times()
        return table

    def _summary_row(
        self,
        stage: str,
        epoch: int,
        counts: np.ndarray,
        weights: np.ndarray,
        losses: np.ndarray,
        totals: dict[str, float],
    ) -> Row:
        num_samples, seconds = int(counts.sum()), self.timer.elapsed()
        mean = totals.pop("loss")
        counted = weights > 0
        squares = (losses[counted] - mean) ** 2
        variance = np.average(squares, weights=weights[counted]) if counted.any() else math.nan
        return {
            "epoch": epoch,
            "stage": stage,
            "loss_mean": mean,
            "loss_std": math.sqrt(variance),
            "total_samples": num_samples,
            **totals,
            "epoch_time": seconds,
            "samples/s": num_samples / seconds,
        }


def _float64(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class StageResult:
    """Result of a stage.

    Attributes:
        stage: `train`, `valid` or `test`.
        epoch: Epoch that was trained, or whose weights were evaluated; counted from 1.
        row: Summary of the stage, a row of the history.
        steps: Table with one row per iteration; empty on ranks other than 0.
        arrays: Values of metrics that are not a single number, such as a confusion matrix.
        is_complete: Whether the stage ran to its end. If training was interrupted, the complete
            stage is reported again once the run is resumed.
    """

    stage: str
    epoch: int
    row: Row
    steps: pd.DataFrame
    arrays: dict[str, np.ndarray]
    is_complete: bool = True
