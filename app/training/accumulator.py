"""Accumulation of step values into the tables of a stage.

Each step returns sums that stay on the device. A block of steps is stacked, reduced over ranks and
copied to the host at once, without waiting for the device while the stage runs. The values of every
iteration, those of the stage so far and the exact value of the stage are computed from these same
blocks, so they cannot disagree.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from app.distributed.collectives import broadcast_object, is_distributed, rank
from app.metrics.stage_metrics import StageMetrics
from app.training.history import Point, Row
from app.training.step_timer import StepTimer
from app.training.step_values import StepBlock, StepValues, means, zeros_like_row

Block = dict[str, Tensor]  # by column, a matrix with a row per step; see `StepBlock.get`
FLUSH_EVERY = 50  # steps whose values are copied to the host at once, by default
FIRST_FLUSHES = (4, 16)  # steps after which the first values of a stage are copied
SECONDS_BETWEEN_LOGS = 1.0
SECONDS_TO_FIRST_LOG = 0.25
FLUSH_AHEAD_SECONDS = 0.2  # before the next log


class StageAccumulator:
    """Collects the values of all steps of a stage.

    Args:
        metrics: Metrics of the stage; they are reset.
        device: Device that the steps run on.
        pop_invalid_rows: Returns how many of the last steps turned out not to count, since it was
            last called.
        flush_every: Number of steps whose values are copied to the host at once.

    Attributes:
        so_far: Mean loss and metrics of the stage, as far as they were last logged.
    """

    def __init__(
        self,
        metrics: StageMetrics,
        device: torch.device,
        pop_invalid_rows: Callable[[], int] = int,
        flush_every: int = FLUSH_EVERY,
    ) -> None:
        metrics.reset()
        self.metrics, self.timer = metrics, StepTimer(device)
        self.pop_invalid_rows, self.flush_every = pop_invalid_rows, flush_every
        self.num_steps = 0
        self.pending: list[StepValues] = []
        self.in_flight: deque[StepBlock] = deque()
        self.received: list[Block] = []
        self.blocks: list[Block] = []  # what was received until the last log or flush
        self.step_values: dict[int, dict[str, np.ndarray]] = {}  # by index of the block
        self.host_values: dict[str, list[float]] = {}
        self.totals: dict[str, Tensor] = {}  # over all blocks, for `so_far`
        self.so_far: Mapping[str, float] = {}
        self.num_logged = 0  # blocks
        self.next_log = time.monotonic() + SECONDS_TO_FIRST_LOG

    def add(self, values: StepValues, host_values: Mapping[str, float] | None = None) -> None:
        """Add the values of a step.

        Args:
            values: Averages and sums that are on the device.
            host_values: Further columns that are plain numbers, such as the learning rate.
        """
        self.pending.append(values)
        self.num_steps += 1
        self.timer.tick()
        for name, number in (host_values or {}).items():
            self.host_values.setdefault(name, []).append(float(number))
        self.mask_last(self.pop_invalid_rows())
        if self.num_steps % self.flush_every == 0 or self.num_steps in FIRST_FLUSHES:
            self._start_flush_if_due()

    @property
    def is_empty(self) -> bool:
        """Whether no step has been added."""
        return self.num_steps == 0

    def flush(self) -> None:
        """Wait until the values of all steps are on the host; all ranks must call this."""
        self.mask_last(self.pop_invalid_rows())
        self._start_flush()
        self._receive(waits=True)
        self._keep_received()

    def _start_flush_if_due(self) -> None:
        """Start to copy values, but not more often than they can be logged."""
        # Several ranks must flush after the same step.
        if is_distributed() or time.monotonic() >= self.next_log - FLUSH_AHEAD_SECONDS:
            self._start_flush()

    def _start_flush(self) -> None:
        if self.pending:
            self.in_flight.append(StepBlock(self.pending))
            self.pending = []

    def _receive(self, waits: bool = False) -> None:
        while self.in_flight and (waits or self.in_flight[0].is_ready):
            self.received.append(self.in_flight.popleft().get())

    def _keep_received(self) -> None:
        if self.received:
            block = _concat(self.received)
            self.received = []
            self.blocks.append(block)
            for name, total in _sums(block).items():
                self.totals[name] = self.totals[name] + total if name in self.totals else total

    def mask_last(self, count: int) -> None:
        """Exclude the last `count` steps from the totals; their cells in the table become empty."""
        if not count:
            return
        num_pending = min(count, len(self.pending))
        if num_pending:
            self.pending[-num_pending:] = map(zeros_like_row, self.pending[-num_pending:])
        remaining = count - num_pending
        if not remaining:
            return
        self._receive(waits=True)
        self._keep_received()
        for index in reversed(range(len(self.blocks))):
            masked = min(remaining, _num_rows(self.blocks[index]))
            if masked:
                self.step_values.pop(index, None)
                for column in self.blocks[index].values():
                    column[-masked:] = 0
            remaining -= masked
        self.totals = _sums(_concat(self.blocks))

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: tensors and plain values; all ranks must call this."""
        self.flush()
        return {
            "blocks": [_concat(self.blocks)] if self.blocks else [],
            "host_values": {n: _float64(values) for n, values in self.host_values.items()},
            "step_times": _float64(self.timer.step_times()),
            "elapsed": self.timer.elapsed(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.received = list(state["blocks"])
        self._keep_received()
        self.num_steps = sum(map(_num_rows, self.blocks))
        self.host_values = {name: t.tolist() for name, t in state["host_values"].items()}
        self.timer.resume(state["step_times"].tolist(), state["elapsed"])

    def has_news(self) -> bool:
        """Return whether values of further steps have arrived and may be logged again."""
        if self.in_flight:
            self._receive()
        return bool(self.received) and time.monotonic() >= self.next_log

    def log(self, stage: str, epoch: int) -> LoggedSteps:
        """Return what has arrived since the last time; only call this on rank 0."""
        self._keep_received()
        first, end = self.num_logged, len(self.blocks)
        self.num_logged = end
        self.next_log = time.monotonic() + SECONDS_BETWEEN_LOGS
        self.so_far = self._values(self.totals)
        num_steps = sum(map(_num_rows, self.blocks))
        self.timer.step_times(num_steps, num_steps)  # keeps no CUDA events of earlier steps
        return LoggedSteps(
            stage,
            epoch,
            self.so_far,
            lambda: self._step_table(stage, epoch, first, end),
            lambda: self._values(_sums(_concat(self.blocks[first:end]))),
        )

    def _values(self, totals: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the mean loss and the metrics of sums, without those that have no value."""
        values = {}
        for name, total in totals.items():
            metric = self.metrics.sum_metrics.get(name)
            if metric is None:
                values[name] = means(total).item()
            elif metric.is_scalar:
                values[name] = metric.values(total[None]).item()
        return {n: value for n, value in values.items() if n == "loss" or not math.isnan(value)}

    def result(self, stage: str, point: Point) -> StageResult:
        """Compute the result of the stage; all ranks must call this.

        On ranks other than 0 only `row` is set.

        Args:
            stage: `train`, `valid` or `test`.
            point: Epoch, and number of optimizer steps if the run validates within epochs.
        """
        self.flush()
        accumulated = self.metrics.compute_accumulating()
        if rank() > 0:
            return StageResult(stage, point, broadcast_object({}), pd.DataFrame(), {})
        result = self._summarize(stage, point, accumulated)
        broadcast_object(result.row)
        return result

    def _summarize(
        self, stage: str, point: Point, accumulated: Mapping[str, np.ndarray]
    ) -> StageResult:
        columns = _concat(self.blocks)
        totals, arrays = {}, {}
        for name, sums in columns.items():
            total = sums.sum(0)
            if name not in self.metrics.sum_metrics:
                totals[name] = means(total).item()
            elif (value := self.metrics.value(name, total)).size == 1:
                totals[name] = value.item()
            else:
                arrays[name] = value
        for name, value in accumulated.items():
            if value.size == 1:
                totals[name] = value.item()
            else:
                arrays[name] = value
        table = self._step_table(stage, point.epoch)
        weights = columns["loss"][:, 1].numpy()
        row = self._summary_row(stage, point, table, weights, totals)
        return StageResult(stage, point, row, table, arrays)

    def _step_table(
        self, stage: str, epoch: int, first_block: int = 0, end_block: int | None = None
    ) -> pd.DataFrame:
        """Return the table of the steps of all blocks, or of those from one block to another."""
        end_block = len(self.blocks) if end_block is None else end_block
        start = sum(map(_num_rows, self.blocks[:first_block]))
        parts = [self._block_values(index) for index in range(first_block, end_block)]
        steps = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        end = start + len(steps["loss"])
        return pd.DataFrame(
            {
                "epoch": epoch,
                "iter": np.arange(start + 1, end + 1),
                "stage": stage,
                "loss": steps.pop("loss"),
                "num_samples": steps.pop("num_samples"),
                **steps,
                **{name: numbers[start:end] for name, numbers in self.host_values.items()},
                "iter_time": self.timer.step_times(start, end),
            }
        )

    def _block_values(self, index: int) -> dict[str, np.ndarray]:
        """Return the values of each step of a block by column."""
        if index not in self.step_values:
            block = self.blocks[index]
            values = {"num_samples": block["loss"][:, -1].numpy().astype(np.int64)}
            for name, sums in block.items():
                metric = self.metrics.sum_metrics.get(name)
                if metric is None:
                    values[name] = means(sums).numpy()
                elif metric.is_scalar:
                    values[name] = metric.values(sums)
            self.step_values[index] = values
        return self.step_values[index]

    def _summary_row(
        self,
        stage: str,
        point: Point,
        table: pd.DataFrame,
        weights: np.ndarray,
        totals: dict[str, float],
    ) -> Row:
        num_samples, seconds = int(table["num_samples"].sum()), self.timer.elapsed()
        mean, counted = totals.pop("loss"), weights > 0
        squares = (table["loss"].to_numpy()[counted] - mean) ** 2
        variance = np.average(squares, weights=weights[counted]) if counted.any() else math.nan
        return {
            "epoch": point.epoch,
            **({} if point.step is None else {"step": point.step}),
            "stage": stage,
            "loss_mean": mean,
            "loss_std": math.sqrt(variance),
            "total_samples": num_samples,
            **totals,
            "epoch_time": seconds,
            "samples/s": num_samples / seconds,
        }


def _num_rows(block: Block) -> int:
    return len(next(iter(block.values())))


def _concat(blocks: Sequence[Block]) -> Block:
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


def _sums(block: Block) -> Block:
    return {name: column.sum(0) for name, column in block.items()}


def _float64(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class LoggedSteps:
    """Values of a stage that is running, as far as they are on the host.

    Attributes:
        stage: `train`, `valid` or `test`.
        epoch: Epoch of the stage, counted from 1.
        so_far: Mean loss and metrics over the stage so far, by name.
        make_steps: Makes `steps`, which most callbacks do not read.
        make_recent: Makes `recent`.
    """

    stage: str
    epoch: int
    so_far: Mapping[str, float]
    make_steps: Callable[[], pd.DataFrame]
    make_recent: Callable[[], Mapping[str, float]]

    @cached_property
    def steps(self) -> pd.DataFrame:
        """Table of the iterations since the last time, with the columns of `StageResult.steps`.

        Iterations that turn out not to count are empty in the latter. A stage that is resumed
        begins with those before the interruption.
        """
        return self.make_steps()

    @cached_property
    def recent(self) -> Mapping[str, float]:
        """Mean loss and metrics over these iterations, by name."""
        return self.make_recent()


@dataclass(frozen=True)
class StageResult:
    """Result of a stage.

    Attributes:
        stage: `train`, `valid` or `test`.
        point: When its weights were trained or evaluated.
        row: Summary of the stage, a row of the history.
        steps: Table with one row per iteration; empty on ranks other than 0.
        arrays: Values of metrics that are not a single number, such as a confusion matrix.
        is_complete: Whether the stage ran to its end. If training was interrupted, the complete
            stage is reported again once the run is resumed.
    """

    stage: str
    point: Point
    row: Row
    steps: pd.DataFrame
    arrays: dict[str, np.ndarray]
    is_complete: bool = True

    @property
    def epoch(self) -> int:
        """Epoch that was trained, or whose weights were evaluated; counted from 1."""
        return self.point.epoch

    @property
    def position(self) -> int:
        """Position on a time axis: the step if the run validates within epochs, else the epoch."""
        return self.point.epoch if self.point.step is None else self.point.step
