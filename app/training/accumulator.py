"""What the steps of a stage return, and what they add up to.

A step returns a row of sums that stay on the device. When the stage ends they are stacked, reduced
over ranks and copied to the host once; from that one block come the value of every iteration and
the exact value of the stage, so the two cannot disagree.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from app.distributed.collectives import all_reduce, broadcast_object, rank
from app.metrics.stage_metrics import StageMetrics, Sums
from app.training.history import Row

FLUSH_EVERY = 10_000  # rows kept on the device at most


@dataclass(frozen=True)
class Average:
    """A mean over the samples of a step.

    Attributes:
        value: A scalar, on its device.
        count: How many samples.
    """

    value: Tensor
    count: int


StepValues = Mapping[str, Average | Sums]
Tick = float | torch.cuda.Event


def zeros_like_row(values: StepValues) -> StepValues:
    """The same row, counting nothing."""
    return {
        name: Average(torch.zeros_like(value.value), 0)
        if isinstance(value, Average)
        else tuple(torch.zeros_like(part) for part in value)
        for name, value in values.items()
    }


def average(value: Tensor, count: int) -> Average:
    """A scalar tensor as the mean over so many samples; cut off from the graph, not read."""
    return Average(value.detach(), count)


@dataclass(frozen=True)
class StageResult:
    """A stage that has ended.

    Attributes:
        stage: `train`, `valid` or `test`.
        epoch: Counted from 1.
        row: Its row of the history.
        steps: A line for each iteration.
        arrays: Values of metrics that are no single number.
        is_whole: Whether it has come to its end; what was cut is told again when the run goes on.
    """

    stage: str
    epoch: int
    row: Row
    steps: pd.DataFrame
    arrays: dict[str, np.ndarray]
    is_whole: bool = True


class StepTimer:
    """Seconds of each step, without waiting for the device.

    On a CUDA device the times are those between events in its stream, read when the stage ends.

    Args:
        device: That the steps run on.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.started = time.perf_counter()
        self.ticks = [self._now()]
        self.before: list[float] = []  # of steps before the run was taken up again
        self.elapsed_before = 0.0

    def _now(self) -> Tick:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def tick(self) -> None:
        """A step has been given to the device."""
        self.ticks.append(self._now())

    def step_times(self) -> list[float]:
        """Seconds between ticks; to be asked once the device is done."""
        pairs = zip(self.ticks[:-1], self.ticks[1:], strict=True)
        return [*self.before, *(_seconds(a, b) for a, b in pairs)]

    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.elapsed_before + time.perf_counter() - self.started


def _seconds(before: Tick, after: Tick) -> float:
    if isinstance(before, float) and isinstance(after, float):
        return after - before
    assert isinstance(before, torch.cuda.Event)
    assert isinstance(after, torch.cuda.Event)
    return float(before.elapsed_time(after)) / 1000


class StageAccumulator:
    """The rows of the stage under way.

    Args:
        metrics: Those of the stage.
        device: That the steps run on.
    """

    def __init__(self, metrics: StageMetrics, device: torch.device) -> None:
        metrics.reset()
        self.metrics, self.clock = metrics, StepTimer(device)
        self.pending: list[StepValues] = []
        self.blocks: list[dict[str, Tensor]] = []
        self.numbers: dict[str, list[float]] = {}

    def add(self, values: StepValues, numbers: Mapping[str, float] | None = None) -> None:
        """One step's values, and numbers that the host knows, as the learning rate it had."""
        self.pending.append(values)
        self.clock.tick()
        for name, number in (numbers or {}).items():
            self.numbers.setdefault(name, []).append(number)
        if len(self.pending) == FLUSH_EVERY:
            self.flush()

    @property
    def is_empty(self) -> bool:
        """Whether no step has come."""
        return not (self.pending or self.blocks)

    def flush(self) -> None:
        """Brings what has come in to the host, in one copy."""
        if self.pending:
            self.blocks.append(to_host(self.pending))
            self.pending = []

    def mask_last(self, count: int) -> None:
        """The last so many steps count nothing; their cells are empty."""
        late = min(count, len(self.pending))
        if late:
            self.pending[-late:] = map(zeros_like_row, self.pending[-late:])
        left = count - late
        for block in reversed(self.blocks):  # brought in already
            length = len(next(iter(block.values())))
            taken = min(left, length)
            for column in block.values():
                column[length - taken :] = 0
            left -= taken

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values of what has come in; every rank must ask."""
        self.flush()
        return {
            "blocks": self.blocks,
            "numbers": self.numbers,
            "times": self.clock.step_times(),
            "elapsed": self.clock.elapsed(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self.blocks, self.numbers = list(state["blocks"]), dict(state["numbers"])
        self.clock.before, self.clock.elapsed_before = state["times"], state["elapsed"]

    def result(self, stage: str, epoch: int) -> StageResult:
        """All rows, added up; ranks other than 0 get the stage's row alone."""
        self.flush()
        accumulated = self.metrics.accumulated()
        if rank() > 0:
            return StageResult(stage, epoch, broadcast_object({}), pd.DataFrame(), {})
        found = self._added_up(stage, epoch, accumulated)
        broadcast_object(found.row)
        return found

    def _added_up(
        self, stage: str, epoch: int, accumulated: Mapping[str, np.ndarray]
    ) -> StageResult:
        columns = {n: torch.cat([block[n] for block in self.blocks]) for n in self.blocks[0]}
        steps, totals, arrays = {}, {}, {}
        for name, sums in columns.items():
            metric = self.metrics.by_step.get(name)
            total = sums.sum(0)
            if metric is None:
                with np.errstate(invalid="ignore"):  # none counted: not a number
                    steps[name] = (sums[:, 0] / sums[:, 1]).numpy()
                    totals[name] = float(total[0] / total[1])
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
        counts = columns["loss"][:, 1].numpy().astype(np.int64)
        table = self._table(stage, epoch, counts, steps)
        row = self._row(stage, epoch, counts, steps["loss"], totals)
        return StageResult(stage, epoch, row, table, arrays)

    def _table(
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
        for name, numbers in self.numbers.items():
            table[name] = numbers
        table["iter_time"] = self.clock.step_times()
        return table

    def _row(
        self,
        stage: str,
        epoch: int,
        counts: np.ndarray,
        losses: np.ndarray,
        totals: dict[str, float],
    ) -> Row:
        samples, seconds = int(counts.sum()), self.clock.elapsed()
        mean = totals.pop("loss")
        some = counts > 0
        squares = (losses[some] - mean) ** 2
        spread = math.sqrt(np.average(squares, weights=counts[some])) if some.any() else math.nan
        return {
            "epoch": epoch,
            "stage": stage,
            "loss_mean": mean,
            "loss_std": spread,
            "total_samples": samples,
            **totals,
            "epoch_time": seconds,
            "samples/s": samples / seconds,
        }


def to_host(rows: list[StepValues]) -> dict[str, Tensor]:
    """By name a host float64 matrix: a line for each step; its sum and count, or its states."""
    columns = {name: _stacked([row[name] for row in rows]) for name in rows[0]}
    widths = [column.shape[1] for column in columns.values()]
    block = all_reduce(torch.cat(list(columns.values()), dim=1)).cpu().double()
    return dict(zip(columns, block.split(widths, dim=1), strict=True))


def _stacked(values: Sequence[Average | Sums]) -> Tensor:
    means = [value for value in values if isinstance(value, Average)]
    if means:
        sums = _wide(torch.stack([mean.value for mean in means]))
        counts = sums.new_tensor([mean.count for mean in means])
        return torch.stack([sums * counts, counts], dim=1)
    states = zip(*(value for value in values if not isinstance(value, Average)), strict=True)
    return torch.cat([_wide(torch.stack(state)).reshape(len(values), -1) for state in states], 1)


def _wide(values: Tensor) -> Tensor:
    """In float64, in which counts and float32 sums are exact; MPS has float32 alone."""
    return values.float() if values.device.type == "mps" else values.double()
