"""Metrics as sums: what one step adds, and what the sums of a stage amount to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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

Sums = tuple[Tensor, ...]
NARROW = 512  # numbers of state up to which a metric is kept step by step


class SumMetric:
    """A metric whose states are sums, so that those of steps can be added up.

    Its states after one update from zero are what a step returns; its value is computed from the
    states of one step, or from their sum over a stage.

    Args:
        metric: On the training device.
    """

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.defaults = {
            n: z.to(metric.device) for n, z in metric._defaults.items() if isinstance(z, Tensor)
        }
        self.on_host = copy.deepcopy(metric).cpu().set_dtype(torch.float64)
        self.is_count: bool | None = None  # whether its value is a whole number, once known

    def sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        """The states after this batch alone, on its device; nothing is read back."""
        # Past the module's __setattr__ and the instance's wrapper of update: both cost time.
        vars(self.metric).update({n: torch.zeros_like(z) for n, z in self.defaults.items()})
        type(self.metric).update(self.metric, outputs, targets)
        return tuple(getattr(self.metric, name) for name in self.defaults)

    def zeros(self) -> Sums:
        """The states after no batch."""
        return tuple(torch.zeros_like(zero) for zero in self.defaults.values())

    def value(self, sums: Tensor) -> np.ndarray:
        """The metric from a host float64 vector of all states, one after the other.

        Counts are divided in float64, so that 9 of 10 are 0.9 and not the nearest float32.
        """
        if self.is_count is None:
            (states,) = self._states(sums[None], exact=False)
            self.is_count = not self._computed(states).is_floating_point()
        (states,) = self._states(sums[None], exact=not self.is_count)
        return self._computed(states).numpy()

    def values(self, rows: Tensor) -> np.ndarray:
        """The metric, a single number, of each row of a matrix of such vectors."""
        exact, found = not self.is_count, np.full(len(rows), np.nan)
        for place, states in enumerate(self._states(rows, exact)):
            try:
                found[place] = self._computed(states).item()
            except (ValueError, RuntimeError):  # too few samples, as R2 has of a single one
                continue
        whole = self.is_count and not np.isnan(found).any()
        return found.astype(np.int64) if whole else found

    def _states(self, rows: Tensor, exact: bool) -> Iterator[tuple[Tensor, ...]]:
        sizes = [zero.numel() for zero in self.defaults.values()]
        columns = [
            (part if exact else part.to(zero.dtype)).reshape(-1, *zero.shape).unbind()
            for zero, part in zip(self.defaults.values(), rows.split(sizes, dim=1), strict=True)
        ]
        return zip(*columns, strict=True)

    def _computed(self, states: tuple[Tensor, ...]) -> Tensor:
        vars(self.on_host).update(zip(self.defaults, states, strict=True))
        value: Tensor = type(self.on_host).compute(self.on_host)
        return value


class StageMetrics:
    """The metrics of one stage.

    Args:
        metrics: By name, on the training device. Those with few states that are sums are kept
            step by step; the others (a curve, a large matrix) accumulate until the stage ends.
        stage: In which they are measured, for errors.

    A metric that collects all outputs is updated when the stage ends: many of them read the
    device in their update. One whose `collects_in_update` is true says that its update does not.
    """

    def __init__(self, metrics: Mapping[str, Metric | OutputMetric], stage: str = "") -> None:
        self.stage = stage
        self.selected = {
            n: m if isinstance(m, OutputMetric) else OutputMetric(m) for n, m in metrics.items()
        }
        plain = {name: selected.metric for name, selected in self.selected.items()}
        self.by_step = {n: SumMetric(m) for n, m in plain.items() if has_narrow_sums(m)}
        self.by_stage = {n: m for n, m in plain.items() if n not in self.by_step}
        self.collected: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for name in self.deferred:  # collected from all ranks, not to be synchronised again
            self.by_stage[name].distributed_available_fn = lambda: False
        self.is_counting = True

    def to(self, device: torch.device) -> StageMetrics:
        """The same, on that device."""
        for selected in self.selected.values():
            selected.metric.to(device)
        return StageMetrics(self.selected, self.stage)

    @contextmanager
    def validating(self) -> Iterator[None]:
        """Metrics of torchmetrics look at their inputs, which reads the device."""
        metrics = [selected.metric for selected in self.selected.values()]
        lax = [m for m in metrics if getattr(m, "validate_args", None) is False]
        for metric in lax:
            metric.validate_args = True
        try:
            yield
        finally:
            for metric in lax:
                metric.validate_args = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Batches count nothing."""
        self.is_counting = False
        try:
            yield
        finally:
            self.is_counting = True

    @property
    def deferred(self) -> list[str]:
        """Those that are updated when the stage ends."""
        return [name for name, metric in self.by_stage.items() if collects(metric)]

    def reset(self) -> None:
        """Forgets what has accumulated; a stage begins."""
        self.collected = {name: [] for name in self.deferred}
        for metric in self.by_stage.values():
            metric.reset()

    def state_dict(self) -> dict[str, Any]:
        """What has accumulated in this rank: tensors on the host."""
        states = {name: states_of(metric) for name, metric in self.by_stage.items()}
        kept: dict[str, Any] = map_tensors(Tensor.cpu, {"states": states, "fed": self.collected})
        return kept

    def load_state_dict(self, kept: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        for name, states in kept["states"].items():
            set_states(self.by_stage[name], states)
        self.collected = {name: self._deferred_batches(name, kept) for name in kept["fed"]}

    def add_state_dict(self, kept: dict[str, Any]) -> None:
        """Takes in what another rank had accumulated.

        Raises:
            UserError: A metric's states cannot be put together.
        """
        for name, states in kept["states"].items():
            try:
                add_states(self.by_stage[name], states)
            except TypeError as error:
                problem = "cannot go on on another number of devices in the midst of an epoch"
                raise UserError(f"{self._key(name)}: it {problem}") from error
        for name in kept["fed"]:
            self.collected[name] += self._deferred_batches(name, kept)

    def _deferred_batches(self, name: str, kept: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        device = self.by_stage[name].device
        fed: list[tuple[Tensor, Tensor]] = map_tensors(lambda t: t.to(device), kept["fed"][name])
        return fed

    def sums(self, outputs: Nested, targets: Nested) -> dict[str, Sums]:
        """What this batch adds to each metric that is kept step by step.

        Raises:
            UserError: Names the metric that cannot take what it is fed.
        """
        found = {}
        for name, selected in self.selected.items():
            try:
                fed = pick(outputs, selected.output), pick(targets, selected.target)
                if name in self.by_step:
                    step = self.by_step[name]
                    found[name] = step.sums(*fed) if self.is_counting else step.zeros()
                elif name in self.collected:
                    self.collected[name].append(
                        fed if self.is_counting else map_tensors(_none_of, fed)
                    )
                elif self.is_counting:
                    self.by_stage[name].update(*fed)
                else:
                    _update_by_nothing(self.by_stage[name], fed)
            except torch.OutOfMemoryError:
                raise
            except _REFUSALS as error:
                raise self._refusal(name, describe(outputs), describe(targets), error) from error
        return found

    def value(self, name: str, sums: Tensor) -> np.ndarray:
        """That of a metric kept step by step, from the sums of the stage.

        Raises:
            UserError: It cannot be computed; names the metric.
        """
        try:
            return self.by_step[name].value(sums)
        except _REFUSALS as error:
            raise UserError(f"{self._key(name)}: {error}") from error

    def accumulated(self) -> dict[str, np.ndarray]:
        """The values of those that accumulated, over all ranks; rank 0 has all of them."""
        values: dict[str, np.ndarray] = {}
        for name, metric in self.by_stage.items():
            if name in self.collected:
                fed = _from_all_ranks(self.collected[name], metric.device)
                self.collected[name] = []
                if rank() > 0:
                    continue
                try:
                    metric.update(*fed)
                except _REFUSALS as error:
                    outputs, targets = map(describe, fed)
                    raise self._refusal(name, outputs, targets, error) from error
            try:
                values |= _arrays(name, metric.compute())
            except _REFUSALS as error:
                raise UserError(f"{self._key(name)}: {error}") from error
        return values

    def _key(self, name: str) -> str:
        return f"metric.{self.stage}.{name}" if self.stage else f"metric {name}"

    def _refusal(self, name: str, outputs: str, targets: str, error: Exception) -> UserError:
        return UserError(
            f"{self._key(name)}: cannot take outputs ({outputs}) with targets ({targets}): {error}"
        )


def _none_of(tensor: Tensor) -> Tensor:
    return tensor[:0]


def _from_all_ranks(fed: list[tuple[Tensor, Tensor]], device: torch.device) -> list[Tensor]:
    """Outputs and targets of all batches and ranks, in rank 0."""
    mine = [torch.cat(parts) for parts in zip(*fed, strict=True)]
    if not is_distributed():
        return mine
    ranks = gather_object([tensor.cpu() for tensor in mine])
    return [torch.cat(parts).to(device) for parts in zip(*ranks, strict=True)]


def _update_by_nothing(metric: Metric, fed: tuple[Tensor, Tensor]) -> None:
    """Lists of states become as long as in other ranks, by what holds no sample."""
    before = states_of(metric)
    metric.update(*fed)
    after = states_of(metric)
    for name, state in before.items():
        if isinstance(state, list):
            state += [_none_of(part) for part in after[name][len(state) :]]
    set_states(metric, before)


def _parts(metric: Metric) -> dict[str, Metric]:
    """The metric, and those that it wraps, by their paths."""
    return {path: part for path, part in metric.named_modules() if isinstance(part, Metric)}


def states_of(metric: Metric) -> dict[str, Tensor | list[Tensor]]:
    """Copies of all that it has accumulated, by path."""
    return {
        f"{path}:{name}": list(state) if isinstance(state, list) else state.clone()
        for path, part in _parts(metric).items()
        for name in part._defaults
        for state in [getattr(part, name)]
    }


def set_states(metric: Metric, states: Mapping[str, Tensor | list[Tensor]]) -> None:
    """Puts back what `states_of` gave."""
    parts = _parts(metric)
    for key, state in states.items():
        path, _, name = key.rpartition(":")
        setattr(parts[path], name, map_tensors(lambda t: t.to(metric.device), state))
        parts[path]._update_count = max(1, parts[path]._update_count)  # else it warns


def add_states(metric: Metric, states: Mapping[str, Tensor | list[Tensor]]) -> None:
    """Takes in what the same metric of another rank had accumulated.

    Raises:
        TypeError: They cannot be put together.
    """
    parts, own = _parts(metric), states_of(metric)
    for key, state in states.items():
        path, _, name = key.rpartition(":")
        reduction, theirs = parts[path]._reductions[name], map_tensors(_to(metric), state)
        if isinstance(theirs, list):
            own[key] += theirs  # type: ignore[operator]
        elif reduction in MERGES:
            own[key] = MERGES[reduction](own[key], theirs)
        else:
            raise TypeError(f"{key} is not a sum, a maximum, a minimum or a list")
    set_states(metric, own)


def _to(metric: Metric) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(metric.device)


MERGES: dict[Any, Callable[..., Tensor]] = {
    dim_zero_sum: torch.add,
    dim_zero_max: torch.maximum,
    dim_zero_min: torch.minimum,
}
_REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError)


def as_metrics(
    metrics: Mapping[str, Metric | OutputMetric | Callable[..., Tensor]], stage: str = ""
) -> StageMetrics:
    """The metrics of a stage from torchmetrics' and from plain functions, by name."""
    return StageMetrics({name: as_metric(metric) for name, metric in metrics.items()}, stage)


def as_metric(metric: Metric | OutputMetric | Callable[..., Tensor]) -> Metric | OutputMetric:
    """A plain function `(output, target) -> tensor` becomes a metric; a metric stays."""
    if isinstance(metric, OutputMetric):
        return OutputMetric(_measured(metric.metric), metric.output, metric.target)
    return _measured(metric)


def _measured(metric: Metric | Callable[..., Tensor]) -> Metric:
    return metric if isinstance(metric, Metric) else FunctionMetric(metric)


def _arrays(name: str, value: Any) -> dict[str, np.ndarray]:
    """By name what a metric computed: one tensor, or several in a tuple or dict."""
    if isinstance(value, Tensor):
        return {name: value.cpu().numpy()}
    if isinstance(value, (tuple, list)):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        inner = (_arrays(f"{name}_{key}", part) for key, part in value.items())
        return {key: part for parts in inner for key, part in parts.items()}
    return {name: np.asarray(value)}


def collects(metric: Metric) -> bool:
    """Whether all outputs are kept for it until the stage ends."""
    lists = any(isinstance(state, list) for state in metric._defaults.values())
    return lists and not getattr(metric, "collects_in_update", False)


def has_narrow_sums(metric: Metric) -> bool:
    """Whether all of its states are tensors of few numbers that add up."""
    states = metric._defaults.values()
    return (
        all(isinstance(state, Tensor) for state in states)
        and all(reduction is dim_zero_sum for reduction in metric._reductions.values())
        and 0 < sum(state.numel() for state in states if isinstance(state, Tensor)) <= NARROW
        and _computes_a_tensor(metric)
    )


def _computes_a_tensor(metric: Metric) -> bool:
    """Whether its value is one tensor, even of no sample at all."""
    trial = copy.deepcopy(metric).cpu()
    try:
        return isinstance(type(trial).compute(trial), Tensor)
    except (*_REFUSALS, ArithmeticError):
        return False
