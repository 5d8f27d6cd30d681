"""Metrics of a stage: sums that each step adds, and values of the whole stage."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from app.distributed.collectives import gather_object, is_distributed, rank
from app.metrics.function import FunctionMetric
from app.metrics.metric_states import (
    empty_slice,
    merge_metric_states,
    metric_states,
    set_metric_states,
    to_device_of,
    update_with_empty,
)
from app.metrics.output_metric import OutputMetric
from app.metrics.sum_metric import METRIC_ERRORS, SumMetric, has_small_sum_states
from app.metrics.update_block import MetricSums, UpdateBlock, UpdateBlocks
from app.runtime.errors import UserError
from app.runtime.nested import Nested, concat, describe, map_tensors, pick

NOT_IN_FILE_NAMES = re.compile(r"[/\\\x00-\x1f\x7f]")
MetricLike = Metric | OutputMetric | Callable[..., Tensor]


class StageMetrics:
    """The metrics of one stage.

    A metric with few states, all of them sums, is evaluated at every step: `update` returns what
    the step adds to its states. The other metrics, such as a curve or a large matrix, accumulate
    until the end of the stage.

    Of the latter, a metric with list states is deferred: its batches are collected and passed to
    `update` at the end of the stage, because many such metrics read from the device in their
    update. A metric sets `collects_in_update = True` to declare that it does not.

    Metrics with equal `update_key` add the same to the same states; a step updates one of them.
    Counts are updated for many steps at once, from copies of their batches; see `UpdateBlock`.

    Args:
        metrics: Metrics by name, on the training device. A plain function `(output, target) ->
            tensor` becomes a `FunctionMetric`.
        stage: Name of the stage, for errors.
    """

    def __init__(self, metrics: Mapping[str, MetricLike], stage: str = "") -> None:
        self.stage = stage
        self.output_metrics = {name: as_output_metric(metric) for name, metric in metrics.items()}
        plain = {name: selected.metric for name, selected in self.output_metrics.items()}
        self.sum_metrics = {n: SumMetric(m) for n, m in plain.items() if has_small_sum_states(m)}
        self.accumulating_metrics = {n: m for n, m in plain.items() if n not in self.sum_metrics}
        self.deferred_batches: dict[str, list[tuple[Nested, Nested]]] = {}
        for name in self.deferred:  # batches of all ranks are gathered; states must not be again
            self.accumulating_metrics[name].distributed_available_fn = lambda: False
        self.parts = {n: f"{m.output!r}, {m.target!r}" for n, m in self.output_metrics.items()}
        self.updated_by = {name: self._first_with_same_update(name) for name in self.sum_metrics}
        self.blocks: dict[str, UpdateBlocks] = {}  # by part of the outputs and targets
        self.is_enabled = True
        self.is_validating = False

    def to(self, device: torch.device) -> StageMetrics:
        """Return the same metrics on a device."""
        for selected in self.output_metrics.values():
            selected.metric.to(device)
        return StageMetrics(self.output_metrics, self.stage)

    @contextmanager
    def validating(self) -> Iterator[None]:
        """Make torchmetrics check its inputs, which synchronizes with the device."""
        metrics = [selected.metric for selected in self.output_metrics.values()]
        unchecked = [m for m in metrics if getattr(m, "validate_args", None) is False]
        for metric in unchecked:
            metric.validate_args = True
        self.is_validating = True
        try:
            yield
        finally:
            self.is_validating = False
            for metric in unchecked:
                metric.validate_args = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore the batches of updates within the context."""
        self.is_enabled = False
        try:
            yield
        finally:
            self.is_enabled = True

    @property
    def deferred(self) -> list[str]:
        """Names of the metrics that are updated at the end of the stage."""
        return [name for name, metric in self.accumulating_metrics.items() if is_deferred(metric)]

    def reset(self) -> None:
        """Clear what the metrics have accumulated, at the start of a stage."""
        self.deferred_batches = {name: [] for name in self.deferred}
        self.blocks = {}
        for metric in self.accumulating_metrics.values():
            metric.reset()

    def update(self, outputs: Nested, targets: Nested) -> dict[str, MetricSums]:
        """Update the metrics with a batch; return the sums that the step adds, by metric.

        Raises:
            UserError: A metric does not support its outputs and targets.
        """
        step_sums: dict[str, MetricSums] = {}
        blocks: dict[str, UpdateBlock | None] = {}  # of this step, by part
        for name, selected in self.output_metrics.items():
            try:
                batch = pick(outputs, selected.output), pick(targets, selected.target)
                if name in self.sum_metrics:
                    updated = self.updated_by[name]
                    if updated not in step_sums:
                        step_sums[updated] = self._step_sums(updated, batch, blocks)
                    step_sums[name] = step_sums[updated]
                elif name in self.deferred_batches:
                    self.deferred_batches[name].append(
                        batch if self.is_enabled else map_tensors(empty_slice, batch)
                    )
                elif self.is_enabled:
                    self.accumulating_metrics[name].update(*batch)
                else:
                    update_with_empty(self.accumulating_metrics[name], batch)
            except METRIC_ERRORS as error:
                self._raise_update_error(error, name, outputs, targets)
        return step_sums

    def _step_sums(
        self, name: str, batch: tuple[Nested, Nested], blocks: dict[str, UpdateBlock | None]
    ) -> MetricSums:
        metric = self.sum_metrics[name]
        if not self.is_enabled:
            return metric.zeros()
        if self.is_validating or not metric.is_vectorized:
            return metric.sums(*batch)
        part = self.parts[name]
        if part not in blocks:
            blocks[part] = self.blocks.setdefault(part, UpdateBlocks()).add(*batch)
        block = blocks[part]
        return metric.sums(*batch) if block is None else block.step_sums(metric)

    def _first_with_same_update(self, name: str) -> str:
        return next(n for n in self.sum_metrics if self._update_key(n) == self._update_key(name))

    def _update_key(self, name: str) -> tuple[object, str]:
        metric = self.output_metrics[name].metric
        return getattr(metric, "update_key", name), self.parts[name]

    def value(self, name: str, sums: Tensor) -> np.ndarray:
        """Return the value of a metric that is evaluated at every step, from the stage's sums.

        Raises:
            UserError: The value cannot be computed.
        """
        with self._compute_errors(name):
            return self.sum_metrics[name].value(sums)

    def compute_accumulating(self) -> dict[str, np.ndarray]:
        """Return the values of the accumulating metrics over all ranks.

        Ranks other than 0 return no deferred metrics.

        Raises:
            UserError: A metric does not support its batches, or its value cannot be computed.
        """
        values: dict[str, np.ndarray] = {}
        for name, metric in self.accumulating_metrics.items():
            if name in self.deferred_batches:
                batch = _gather_batches(self.deferred_batches[name], metric.device)
                self.deferred_batches[name] = []
                if rank() > 0:
                    continue
                try:
                    metric.update(*batch)
                except METRIC_ERRORS as error:
                    self._raise_update_error(error, name, *batch)
            with self._compute_errors(name):
                values |= _to_arrays(name, metric.compute())
        return values

    def state_dict(self) -> dict[str, Any]:
        """Return what this rank has accumulated, as tensors on the CPU."""
        states = {name: metric_states(metric) for name, metric in self.accumulating_metrics.items()}
        saved: dict[str, Any] = map_tensors(
            Tensor.cpu, {"states": states, "fed": self.deferred_batches}
        )
        return saved

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        for name, states in saved["states"].items():
            set_metric_states(self.accumulating_metrics[name], states)
        self.deferred_batches = {name: self._saved_batches(name, saved) for name in saved["fed"]}

    def merge_state_dict(self, saved: dict[str, Any]) -> None:
        """Add the result of another rank's `state_dict`.

        Raises:
            UserError: The states of a metric cannot be merged.
        """
        for name, states in saved["states"].items():
            try:
                merge_metric_states(self.accumulating_metrics[name], states)
            except TypeError as error:
                raise UserError(
                    f"{self._config_key(name)}: its states cannot be merged, so the run cannot "
                    "resume within an epoch on another number of devices"
                ) from error
        for name in saved["fed"]:
            self.deferred_batches[name] += self._saved_batches(name, saved)

    def _saved_batches(self, name: str, saved: dict[str, Any]) -> list[tuple[Nested, Nested]]:
        metric = self.accumulating_metrics[name]
        batches: list[tuple[Nested, Nested]] = map_tensors(to_device_of(metric), saved["fed"][name])
        return batches

    def _config_key(self, name: str) -> str:
        return f"metric.{self.stage}.{name}" if self.stage else f"metric {name}"

    def _raise_update_error(
        self, error: Exception, name: str, outputs: Nested, targets: Nested
    ) -> NoReturn:
        if isinstance(error, torch.OutOfMemoryError):
            raise error
        raise UserError(
            f"{self._config_key(name)}: cannot take outputs ({describe(outputs)}) with "
            f"targets ({describe(targets)}): {error}"
        ) from error

    @contextmanager
    def _compute_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except METRIC_ERRORS as error:
            raise UserError(f"{self._config_key(name)}: {error}") from error


def as_output_metric(metric: MetricLike) -> OutputMetric:
    """Return a metric or function as an `OutputMetric` whose metric is one of torchmetrics."""
    if isinstance(metric, OutputMetric):
        return replace(metric, metric=_as_metric(metric.metric))
    return OutputMetric(_as_metric(metric))


def _as_metric(metric: Metric | Callable[..., Tensor]) -> Metric:
    return metric if isinstance(metric, Metric) else FunctionMetric(metric)


def is_deferred(metric: Metric) -> bool:
    """Whether batches are collected and passed to the metric at the end of the stage."""
    has_lists = any(isinstance(state, list) for state in metric._defaults.values())
    return has_lists and not getattr(metric, "collects_in_update", False)


def _gather_batches(
    batches: list[tuple[Nested, Nested]], device: torch.device
) -> tuple[Nested, Nested]:
    """Return the concatenated outputs and targets of all ranks; complete on rank 0 only."""
    local: tuple[Nested, Nested] = concat(batches)
    if is_distributed():
        by_rank = gather_object(map_tensors(Tensor.cpu, local))
        local = map_tensors(lambda tensor: tensor.to(device), concat(by_rank or [local]))
    return local


def _to_arrays(name: str, value: Any) -> dict[str, np.ndarray]:
    """Return the value of a metric by name; parts of a tuple or dict are named `<name>_<key>`.

    The part with the key `""` has the name of the metric.

    The names become those of files: characters of a key that separate folders become `_`.
    """
    if isinstance(value, Tensor):
        return {name: value.cpu().numpy()}
    if isinstance(value, (tuple, list)):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        names = {key: _part_name(name, str(key)) for key in value}
        nested = (_to_arrays(names[key], part) for key, part in value.items())
        return {key: array for arrays in nested for key, array in arrays.items()}
    return {name: np.asarray(value)}


def _part_name(name: str, key: str) -> str:
    return f"{name}_{NOT_IN_FILE_NAMES.sub('_', key)}" if key else name
