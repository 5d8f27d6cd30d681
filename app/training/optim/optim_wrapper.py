"""From a loss to changed weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from app.distributed.collectives import all_reduce, all_reduce_async
from app.distributed.strategies import (
    SingleDevice,
    finite_indicator,
    shard_like,
    split_dtensors,
    total_norm,
)
from app.runtime.errors import UserError
from app.training.accumulator import Average
from app.training.optim.finite_check import FiniteCheck, Policy
from app.training.optim.lr_schedule import LRSchedule


class OptimWrapper:
    """Backward, accumulate, clip, step, schedule.

    Args:
        optimizer: Of the parameters.
        schedule: Of its learning rate; None keeps it.
        scaler: Of the gradients; None, or one that is off, for all types but fp16.
        batch_size: Samples in a full batch; of use where batches are accumulated.
        accumulate: Batches to one step of the optimizer.
        clip_norm: Largest norm of all gradients together, or None.
        clip_value: Largest absolute value of a gradient, or None.
        alone: Its parameters are all that learn; else gradients reach no others than them.
        tracks_norm: Keeps the norm of the gradients, before clipping.
        zero_non_finite: Gradients that are no numbers become 0, before clipping.
        parallel: Brings the gradients of several ranks together; None where there is one.

    Attributes:
        guard: Who looks at the loss and the gradients before each step; None where nobody does.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: LRSchedule | None = None,
        scaler: torch.amp.GradScaler | None = None,
        batch_size: int = 1,
        accumulate: int = 1,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        owns_all_parameters: bool = True,
        tracks_grad_norm: bool = False,
        zero_non_finite: bool = False,
        strategy: SingleDevice | None = None,
    ) -> None:
        self.optimizer, self.schedule = optimizer, schedule or LRSchedule(optimizer)
        self.scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
        self.accumulate, self.full_batch_size = accumulate, batch_size * accumulate
        self.clip_norm, self.clip_value = clip_norm, clip_value
        self.owns_all_parameters, self.tracks_grad_norm = owns_all_parameters, tracks_grad_norm
        self.zero_non_finite = zero_non_finite
        self.strategy = strategy or SingleDevice(torch.nn.Module())
        self.weighted = accumulate > 1 or self.strategy.is_distributed  # samples weigh, not batches
        self.finite_check: FiniteCheck | None = None
        self.losses: Tensor | None = None  # NaN where one since the last step was no number
        self.grad_norm: Tensor | None = None  # of the step just made
        self.steps = self.batches = self.samples = 0
        self.last_batch_samples = 0  # samples of the last batch
        self.total: Callable[[], float] | None = None  # samples of all ranks, once known

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.schedule.lr

    def step(self, loss: Tensor, num_samples: int) -> None:
        """Learns from the mean loss of so many samples; changes the weights when it is time to."""
        if self.finite_check is not None and self.finite_check.trace_hook is not None:
            self.finite_check.trace_hook(list(self._trainable()), loss)
            return
        self.batches += 1
        self.samples += 0 if self.strategy.is_padding else num_samples
        if self.batches == self.accumulate:
            self.total = all_reduce_async(self.samples)  # ranks tell while gradients are computed
        self.backward(loss, num_samples)
        if self.batches == self.accumulate:
            self.apply()

    def backward(self, loss: Tensor, num_samples: int) -> None:
        """Adds the gradients of the loss to those of the parameters; frozen ones get none.

        Raises:
            UserError: The loss does not depend on what learns.
        """
        learning = list(self._trainable())
        if not learning:
            return
        if not loss.requires_grad:
            raise UserError("loss: it does not depend on any parameter that learns")
        self.last_batch_samples = 0 if self.strategy.is_padding else num_samples
        begins = (
            None
            if self.finite_check is None or self.strategy.is_padding
            else self._initial_gradient(loss)
        )
        if self.weighted:
            loss = loss * (self.last_batch_samples / self.full_batch_size)
        with torch.autocast(loss.device.type, enabled=False):
            scaled = self.scaler.scale(loss)
            scaled.backward(begins, inputs=None if self.owns_all_parameters else learning)

    @property
    def checks_loss_only(self) -> bool:
        """Whether gradients may be no numbers: they are repaired, or the scaler sees to them."""
        return self.zero_non_finite or self.scaler.is_enabled()

    def _initial_gradient(self, loss: Tensor) -> Tensor | None:
        """What the backward pass begins with; the gradients of a bad loss are NaN in all ranks."""
        nothing = loss.detach() * 0  # NaN where the loss is infinite or NaN
        if not self.checks_loss_only:
            return nothing + 1
        self.losses = nothing if self.losses is None else self.losses + nothing
        return None

    def flush(self) -> None:
        """Uses what has accumulated; an epoch ends."""
        if self.batches:
            self.apply()

    def apply(self) -> None:
        """Changes the weights by the gradients that are there, and forgets these."""
        total = (self.total or all_reduce_async(self.samples or self.last_batch_samples))()
        self.strategy.all_reduce_gradients(self._parameters())
        made = True
        if next(iter(self._gradients()), None) is not None:
            made = self._apply_gradients(total)
        self.strategy.zero_grad(self._parameters())
        if torch.is_autocast_enabled(self.device.type):
            torch.clear_autocast_cache()  # it holds the old weights until the step is over
        if made:
            self.schedule.step_end()
            self.steps += 1
        self.batches = self.samples = 0
        self.total = self.losses = None

    def _apply_gradients(self, total: float) -> bool:
        """Makes the step, unless the guard is against it; gives whether."""
        if (
            self.finite_check is not None
            and self.checks_loss_only
            and not self._is_step_allowed(self._losses())
        ):
            return False
        changes = (self.clip_value, self.clip_norm, self.tracks_grad_norm, self.zero_non_finite)
        if self.scaler.is_enabled() and any(changes):
            self.scaler.unscale_(self.optimizer)
        factor = (
            self.full_batch_size * self.strategy.grad_divisor / total
            if self.weighted and total
            else 1.0
        )
        if factor != 1.0:  # as one batch of just these samples
            torch._foreach_mul_(list(self._gradients()), factor)
        if self.zero_non_finite:
            for gradient in self._gradients():
                gradient.nan_to_num_(0.0, 0.0, 0.0)
        guarded = self.finite_check is not None and not self.checks_loss_only
        if self.tracks_grad_norm or self.clip_norm is not None:
            norm = evidence = total_norm(list(self._gradients()))
        elif guarded:
            evidence = finite_indicator(list(self._gradients()))
        if self.tracks_grad_norm:
            self.grad_norm = norm
        if guarded and not self._is_step_allowed(evidence):
            return False
        if self.clip_value is not None:
            torch.nn.utils.clip_grad_value_(self._parameters(), self.clip_value)
        if self.clip_norm is not None:
            if self.clip_value is not None:
                norm = total_norm(list(self._gradients()))
            for same in split_dtensors(list(self._parameters())):
                torch.nn.utils.clip_grads_with_norm_(same, self.clip_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return True

    def _is_step_allowed(self, evidence: Tensor) -> bool:
        scaled = self.scaler.is_enabled()
        guard, optimizer = self.finite_check, self.optimizer
        return guard is None or guard.is_finite(evidence, optimizer, self.steps, scaled)

    def _losses(self) -> Tensor:
        """Those of all ranks, as evidence: they are in no gradient that could be looked at."""
        mine = torch.zeros((), device=self.device) if self.losses is None else self.losses
        return all_reduce(mine.float())

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values of the optimizer, the schedule and the scaler."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "steps": self.steps,
        }

    def snapshot(self) -> dict[str, Any]:
        """How far it is: plain values, to be put back by `put_back`."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return {"steps": self.steps, "schedule": self.schedule.state_dict(), "rates": rates}

    def restore(self, position: dict[str, Any]) -> None:
        """The steps since then have not been made."""
        self.steps = position["steps"]
        self.schedule.load_state_dict(position["schedule"])
        for group, rate in zip(self.optimizer.param_groups, position["rates"], strict=True):
            group["lr"] = rate

    def load_state_dict(self, state: dict[str, Any], reset_schedule: bool = False) -> None:
        """Goes on from what `state_dict` gave.

        Args:
            state: As given.
            reset_schedule: Keep the current rates, schedule and settings, and move the schedule
                to the number of steps that were saved.
        """
        whole, parameters = state["optimizer"], list(self._parameters())
        parts = {
            number: {n: shard_like(value, parameters[number]) for n, value in values.items()}
            for number, values in whole["state"].items()
        }
        if reset_schedule:
            whole = {**whole, "param_groups": self.optimizer.state_dict()["param_groups"]}
        self.optimizer.load_state_dict({**whole, "state": parts})
        if reset_schedule:
            self.schedule.go_to(state["steps"])
        else:
            self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.steps = state["steps"]

    @property
    def device(self) -> torch.device:
        """That of the parameters."""
        return next(iter(self._parameters())).device

    def _parameters(self) -> Iterable[Tensor]:
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def _trainable(self) -> Iterable[Tensor]:
        return (parameter for parameter in self._parameters() if parameter.requires_grad)

    def _gradients(self) -> Iterable[Tensor]:
        return (p.grad for p in self._parameters() if p.grad is not None)


ONLY = ""  # the name of an optimization that has no other beside it


class OptimWrapperDict:
    """The optimizations of a task.

    Args:
        optimizations: By name; the names are those of parts of the model. A single one may be
            given as it is.
        on_nonfinite: What follows a loss or gradients that are no numbers; None looks at neither.
    """

    def __init__(
        self,
        wrappers: Mapping[str, OptimWrapper] | OptimWrapper,
        on_nonfinite: Policy | None = "stop",
    ) -> None:
        alone = isinstance(wrappers, OptimWrapper)
        self.wrappers: dict[str, OptimWrapper] = (
            {ONLY: wrappers} if alone else dict(wrappers)  # type: ignore[dict-item, arg-type]
        )
        first = next(iter(self.wrappers.values()))
        self.finite_check = FiniteCheck(on_nonfinite, first.device) if on_nonfinite else None
        for one in self.wrappers.values():
            one.finite_check = self.finite_check

    def __getitem__(self, name: str) -> OptimWrapper:
        return self.wrappers[name]

    @property
    def single(self) -> OptimWrapper:
        """The only one."""
        (optimization,) = self.wrappers.values()
        return optimization

    @property
    def steps(self) -> int:
        """How many steps the first optimizer has made."""
        return next(iter(self.wrappers.values())).steps

    @property
    def accumulate(self) -> int:
        """Batches to one step."""
        return next(iter(self.wrappers.values())).accumulate

    @property
    def at_step_boundary(self) -> bool:
        """Whether no gradients wait for further batches."""
        return not any(one.batches for one in self.wrappers.values())

    @property
    def skipped_step(self) -> bool:
        """Whether a step of the batch under way was not made, since something is no number."""
        return self.finite_check is not None and self.finite_check.skipped

    @property
    def steps_next(self) -> bool:
        """Whether the next batch makes a step, if it is learned from once."""
        first = next(iter(self.wrappers.values()))
        return first.batches + 1 >= first.accumulate

    def lrs(self) -> dict[str, float]:
        """The learning rates of the next step: `lr`, or `lr_<name>` of each."""
        return {column("lr", name): one.lr for name, one in self.wrappers.items()}

    def grad_norms(self, count: int) -> dict[str, Average]:
        """The norms of the gradients, where they are kept; batches without a step have none."""
        return {
            column("gradient_norm", name): _norm(one, count)
            for name, one in self.wrappers.items()
            if one.tracks_grad_norm
        }

    def flush(self) -> None:
        """Uses what has accumulated; an epoch ends."""
        for optimization in self.wrappers.values():
            optimization.flush()

    def epoch_end(self, goal_value: float | None) -> None:
        """An epoch is over; `goal_value` is None where the goal was not measured in it."""
        for optimization in self.wrappers.values():
            optimization.schedule.epoch_end(goal_value)

    def snapshot(self) -> dict[str, Any]:
        """How far all are."""
        return {name: one.snapshot() for name, one in self.wrappers.items()}

    def restore(self, position: dict[str, Any]) -> None:
        """The steps since then have not been made."""
        for name, one in self.wrappers.items():
            one.restore(position[name])

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {name: one.state_dict() for name, one in self.wrappers.items()}

    def load_state_dict(self, state: dict[str, Any], reset_schedule: bool = False) -> None:
        """Goes on from what `state_dict` gave; `anew` as in `Optimization.load_state_dict`."""
        for name, one in self.wrappers.items():
            one.load_state_dict(state[name], reset_schedule)


def _norm(one: OptimWrapper, count: int) -> Average:
    if one.grad_norm is None:
        return Average(torch.zeros((), device=one.device), 0)
    return Average(one.grad_norm, 0 if one.batches else count)


def column(what: str, name: str) -> str:
    """`lr`, or `lr_generator` where there are several."""
    return f"{what}_{name}" if name else what
