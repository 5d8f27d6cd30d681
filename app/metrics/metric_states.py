"""States of metrics that accumulate over a stage: saved, restored, and merged over ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_max, dim_zero_min, dim_zero_sum

from app.runtime.nested import map_tensors

MetricStates = Mapping[str, Tensor | list[Tensor]]  # by `<path of the metric>:<name of the state>`
MERGE_FUNCTIONS: dict[Any, Callable[..., Tensor]] = {  # by torchmetrics' reduction over ranks
    dim_zero_sum: torch.add,
    dim_zero_max: torch.maximum,
    dim_zero_min: torch.minimum,
}


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
        setattr(parts[path], name, map_tensors(to_device_of(metric), state))
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
        other = map_tensors(to_device_of(metric), state)
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


def to_device_of(metric: Metric) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(metric.device)


def update_with_empty(metric: Metric, batch: tuple[Tensor, Tensor]) -> None:
    """Extend list states by empty tensors, so that they are as long as on other ranks."""
    before = metric_states(metric)
    metric.update(*batch)
    after = metric_states(metric)
    for name, state in before.items():
        if isinstance(state, list):
            state += [empty_slice(part) for part in after[name][len(state) :]]
    set_metric_states(metric, before)


def empty_slice(tensor: Tensor) -> Tensor:
    return tensor[:0]
