"""Metrics of a stage: sums that each step adds, and values of the whole stage."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_max, dim_zero_min, dim_zero_sum

from app.distributed.collectives import gather_object, is_distributed, rank
from app.metrics.function import FunctionMetric
from app.metrics.output_metric import OutputMetric
from app.runtime.errors import UserError
from app.runtime.nested import Nested, describe, map_tensors, pick

MetricLike = Metric | OutputMetric | Callable[..., Tensor]
Sums = tuple[Tensor, ...]
MetricStates = Mapping[str, Tensor | list[Tensor]]  # by `<path of the metric>:<name of the state>`
MAX_STATE_SIZE = 512  # numbers in the states of a metric that is evaluated at every step
MERGE_FUNCTIONS: dict[Any, Callable[..., Tensor]] = {  # by torchmetrics' reduction over ranks
    dim_zero_sum: torch.add,
    dim_zero_max: torch.maximum,
    dim_zero_min: torch.minimum,
}
METRIC_ERRORS = (  # that a metric raises for outputs or targets that it does not support
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    AttributeError,
    AssertionError,
)


class StageMetrics:
    """The metrics of one stage.

    A metric with few states, all of them sums, is evaluated at every step: `update` returns what
    the step adds to its states. The other metrics, such as a curve or a large matrix, accumulate
    until the end of the stage. Metrics with equal `update_key` would add the same to the same
    states; a step updates only one of them.

    Of the latter, a metric with list states is deferred: its batches are collected and passed to
    `update` at the end of the stage, because many such metrics read from the device in their
    update. A metric sets `collects_in_update = True` to declare that it does not.

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
        self.deferred_batches: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for name in self.deferred:  # batches of all ranks are gathered; states must not be again
            self.accumulating_metrics[name].distributed_available_fn = lambda: False
        self.is_enabled = True

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
        try:
            yield
        finally:
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
        for metric in self.accumulating_metrics.values():
            metric.reset()

    def update(self, outputs: Nested, targets: Nested) -> dict[str, Sums]:
        """Update the metrics with a batch; return the sums that the step adds, by metric.

        Raises:
            UserError: A metric does not support its outputs and targets.
        """
        step_sums: dict[str, Sums] = {}
        shared: dict[object, Sums] = {}
        for name, selected in self.output_metrics.items():
            with self._update_errors(name, outputs, targets):
                batch = pick(outputs, selected.output), pick(targets, selected.target)
                if name in self.sum_metrics:
                    metric = self.sum_metrics[name]
                    update_key = getattr(selected.metric, "update_key", name)
                    key = (update_key, str(selected.output), str(selected.target))
                    if key not in shared:
                        shared[key] = metric.sums(*batch) if self.is_enabled else metric.zeros()
                    step_sums[name] = shared[key]
                elif name in self.deferred_batches:
                    self.deferred_batches[name].append(
                        batch if self.is_enabled else map_tensors(_empty_slice, batch)
                    )
                elif self.is_enabled:
                    self.accumulating_metrics[name].update(*batch)
                else:
                    _update_with_empty(self.accumulating_metrics[name], batch)
        return step_sums

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
                with self._update_errors(name, *batch):
                    metric.update(*batch)
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

    def _saved_batches(self, name: str, saved: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        metric = self.accumulating_metrics[name]
        batches: list[tuple[Tensor, Tensor]] = map_tensors(
            _to_device_of(metric), saved["fed"][name]
        )
        return batches

    def _config_key(self, name: str) -> str:
        return f"metric.{self.stage}.{name}" if self.stage else f"metric {name}"

    @contextmanager
    def _update_errors(self, name: str, outputs: Nested, targets: Nested) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except METRIC_ERRORS as error:
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


class SumMetric:
    """A metric whose states are sums, so that those of steps can be added up.

    A step returns the states after one update from zero. The value is computed from the states of
    one step, or from their sum over a stage.

    Args:
        metric: Metric on the training device.
    """

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.defaults = {
            n: z.to(metric.device) for n, z in metric._defaults.items() if isinstance(z, Tensor)
        }
        self.cpu_metric = copy.deepcopy(metric).cpu().set_dtype(torch.float64)
        zeros = tuple(zero.cpu() for zero in self.defaults.values())
        self.has_integer_value = not self._compute(zeros).is_floating_point()

    def sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Return the states after this batch alone, without synchronizing with the device."""
        # Bypass Module.__setattr__ and torchmetrics' wrapper of update, which are slow.
        vars(self.metric).update({n: torch.zeros_like(z) for n, z in self.defaults.items()})
        type(self.metric).update(self.metric, outputs, targets)
        return tuple(getattr(self.metric, name) for name in self.defaults)

    def zeros(self) -> Sums:
        """Return the states of a step without samples."""
        return tuple(torch.zeros_like(zero) for zero in self.defaults.values())

    def value(self, sums: Tensor) -> np.ndarray:
        """Return the value of the metric.

        Args:
            sums: Concatenated states, a float64 vector on the CPU. Counts are divided in float64,
                so that 9 of 10 are exactly 0.9 and not the nearest float32.
        """
        (states,) = self._split_states(sums[None])
        return self._compute(states).numpy()

    def values(self, rows: Tensor) -> np.ndarray:
        """Return the values of a scalar metric, for each row of a matrix of concatenated states.

        NaN marks the rows without a value.
        """
        values = np.full(len(rows), np.nan)
        for index, states in enumerate(self._split_states(rows)):
            with suppress(ValueError, RuntimeError):  # too few samples, such as R2 of a single one
                values[index] = self._compute(states).item()
        is_integer = self.has_integer_value and not np.isnan(values).any()
        return values.astype(np.int64) if is_integer else values

    def _split_states(self, rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
        sizes = [zero.numel() for zero in self.defaults.values()]
        parts = zip(self.defaults.values(), rows.split(sizes, dim=1), strict=True)
        columns = [
            (part.to(zero.dtype) if self.has_integer_value else part).reshape(-1, *zero.shape)
            for zero, part in parts
        ]
        return zip(*columns, strict=True)

    def _compute(self, states: tuple[Tensor, ...]) -> Tensor:
        vars(self.cpu_metric).update(zip(self.defaults, states, strict=True))
        value: Tensor = type(self.cpu_metric).compute(self.cpu_metric)
        return value


def as_output_metric(metric: MetricLike) -> OutputMetric:
    """Return a metric or function as an `OutputMetric` whose metric is one of torchmetrics."""
    if isinstance(metric, OutputMetric):
        return replace(metric, metric=_as_metric(metric.metric))
    return OutputMetric(_as_metric(metric))


def _as_metric(metric: Metric | Callable[..., Tensor]) -> Metric:
    return metric if isinstance(metric, Metric) else FunctionMetric(metric)


def has_small_sum_states(metric: Metric) -> bool:
    """Whether all states are tensors that are summed over ranks and have few elements in total."""
    states = metric._defaults.values()
    return (
        all(isinstance(state, Tensor) for state in states)
        and all(reduction is dim_zero_sum for reduction in metric._reductions.values())
        and 0
        < sum(state.numel() for state in states if isinstance(state, Tensor))
        <= MAX_STATE_SIZE
        and _computes_tensor(metric)
    )


def _computes_tensor(metric: Metric) -> bool:
    """Whether the value is a single tensor, even without any samples."""
    copied = copy.deepcopy(metric).cpu()
    try:
        return isinstance(type(copied).compute(copied), Tensor)
    except (*METRIC_ERRORS, ArithmeticError):
        return False


def is_deferred(metric: Metric) -> bool:
    """Whether batches are collected and passed to the metric at the end of the stage."""
    has_lists = any(isinstance(state, list) for state in metric._defaults.values())
    return has_lists and not getattr(metric, "collects_in_update", False)


def metric_states(metric: Metric) -> dict[str, Tensor | list[Tensor]]:
    """Return copies of the states of a metric and of the metrics that it wraps."""
    return {
        f"{path}:{name}": list(state) if isinstance(state, list) else state.clone()
        for path, part in _submetrics(metric).items()
        for name in part._defaults
        for state in [getattr(part, name)]
    }


def set_metric_states(metric: Metric, states: MetricStates) -> None:
    """Restore the result of `metric_states`."""
    parts = _submetrics(metric)
    for key, state in states.items():
        path, _, name = key.rpartition(":")
        setattr(parts[path], name, map_tensors(_to_device_of(metric), state))
        # Otherwise torchmetrics warns that compute was called before update.
        parts[path]._update_count = max(1, parts[path]._update_count)


def merge_metric_states(metric: Metric, states: MetricStates) -> None:
    """Add the states of the same metric of another rank.

    Raises:
        TypeError: A state is neither a sum, a maximum, a minimum nor a list.
    """
    parts, merged = _submetrics(metric), metric_states(metric)
    for key, state in states.items():
        path, _, name = key.rpartition(":")
        reduction = parts[path]._reductions[name]
        other = map_tensors(_to_device_of(metric), state)
        if isinstance(other, list):
            merged[key] += other  # type: ignore[operator]
        elif reduction in MERGE_FUNCTIONS:
            merged[key] = MERGE_FUNCTIONS[reduction](merged[key], other)
        else:
            raise TypeError(f"{key} is not a sum, a maximum, a minimum or a list")
    set_metric_states(metric, merged)


def _submetrics(metric: Metric) -> dict[str, Metric]:
    """Return the metric and the metrics that it wraps, by path."""
    return {path: part for path, part in metric.named_modules() if isinstance(part, Metric)}


def _to_device_of(metric: Metric) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(metric.device)


def _update_with_empty(metric: Metric, batch: tuple[Tensor, Tensor]) -> None:
    """Extend list states by empty tensors, so that they are as long as on other ranks."""
    before = metric_states(metric)
    metric.update(*batch)
    after = metric_states(metric)
    for name, state in before.items():
        if isinstance(state, list):
            state += [_empty_slice(part) for part in after[name][len(state) :]]
    set_metric_states(metric, before)


def _empty_slice(tensor: Tensor) -> Tensor:
    return tensor[:0]


def _gather_batches(batches: list[tuple[Tensor, Tensor]], device: torch.device) -> list[Tensor]:
    """Return the concatenated outputs and targets of all ranks; complete on rank 0 only."""
    local = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    if not is_distributed():
        return local
    by_rank = gather_object([tensor.cpu() for tensor in local])
    return [torch.cat(parts).to(device) for parts in zip(*by_rank, strict=True)]


def _to_arrays(name: str, value: Any) -> dict[str, np.ndarray]:
    """Return the value of a metric by name; parts of a tuple or dict are named `<name>_<key>`."""
    if isinstance(value, Tensor):
        return {name: value.cpu().numpy()}
    if isinstance(value, (tuple, list)):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        nested = (_to_arrays(f"{name}_{key}", part) for key, part in value.items())
        return {key: array for arrays in nested for key, array in arrays.items()}
    return {name: np.asarray(value)}
