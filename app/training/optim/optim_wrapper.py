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
from app.training.accumulator import Mean
from app.training.optim.finite_check import Guard, Policy
from app.training.optim.lr_schedule import Schedule


class Optimization:
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
        schedule: Schedule | None = None,
        scaler: torch.amp.GradScaler | None = None,
        batch_size: int = 1,
        accumulate: int = 1,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        alone: bool = True,
        tracks_norm: bool = False,
        zero_non_finite: bool = False,
        parallel: SingleDevice | None = None,
    ) -> None:
        self.optimizer, self.schedule = optimizer, schedule or Schedule(optimizer)
        self.scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
        self.accumulate, self.full = accumulate, batch_size * accumulate
        self.clip_norm, self.clip_value = clip_norm, clip_value
        self.alone, self.tracks_norm = alone, tracks_norm
        self.zero_non_finite = zero_non_finite
        self.parallel = parallel or SingleDevice(torch.nn.Module())
        self.weighted = accumulate > 1 or self.parallel.is_distributed  # samples weigh, not batches
        self.guard: Guard | None = None
        self.losses: Tensor | None = None  # NaN where one since the last step was no number
        self.norm: Tensor | None = None  # of the step just made
        self.steps = self.batches = self.samples = 0
        self.latest = 0  # samples of the last batch
        self.total: Callable[[], float] | None = None  # samples of all ranks, once known

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.schedule.lr

    def step(self, loss: Tensor, num_samples: int) -> None:
        """Learns from the mean loss of so many samples; changes the weights when it is time to."""
        if self.guard is not None and self.guard.replay is not None:
            self.guard.replay(list(self._learning()), loss)
            return
        self.batches += 1
        self.samples += 0 if self.parallel.is_padding else num_samples
        if self.batches == self.accumulate:
            self.total = all_reduce_async(self.samples)  # ranks tell while gradients are computed
        self.backward(loss, num_samples)
        if self.batches == self.accumulate:
            self.update()

    def backward(self, loss: Tensor, num_samples: int) -> None:
        """Adds the gradients of the loss to those of the parameters; frozen ones get none.

        Raises:
            UserError: The loss does not depend on what learns.
        """
        learning = list(self._learning())
        if not learning:
            return
        if not loss.requires_grad:
            raise UserError("loss: it does not depend on any parameter that learns")
        self.latest = 0 if self.parallel.is_padding else num_samples
        begins = None if self.guard is None or self.parallel.is_padding else self._looked_at(loss)
        if self.weighted:
            loss = loss * (self.latest / self.full)
        with torch.autocast(loss.device.type, enabled=False):
            scaled = self.scaler.scale(loss)
            scaled.backward(begins, inputs=None if self.alone else learning)

    @property
    def by_loss(self) -> bool:
        """Whether gradients may be no numbers: they are repaired, or the scaler sees to them."""
        return self.zero_non_finite or self.scaler.is_enabled()

    def _looked_at(self, loss: Tensor) -> Tensor | None:
        """What the backward pass begins with; the gradients of a bad loss are NaN in all ranks."""
        nothing = loss.detach() * 0  # NaN where the loss is infinite or NaN
        if not self.by_loss:
            return nothing + 1
        self.losses = nothing if self.losses is None else self.losses + nothing
        return None

    def finish(self) -> None:
        """Uses what has accumulated; an epoch ends."""
        if self.batches:
            self.update()

    def update(self) -> None:
        """Changes the weights by the gradients that are there, and forgets these."""
        total = (self.total or all_reduce_async(self.samples or self.latest))()
        self.parallel.all_reduce_gradients(self._parameters())
        made = True
        if next(iter(self._gradients()), None) is not None:
            made = self._learn(total)
        self.parallel.zero_grad(self._parameters())
        if torch.is_autocast_enabled(self.device.type):
            torch.clear_autocast_cache()  # it holds the old weights until the step is over
        if made:
            self.schedule.step_end()
            self.steps += 1
        self.batches = self.samples = 0
        self.total = self.losses = None

    def _learn(self, total: float) -> bool:
        """Makes the step, unless the guard is against it; gives whether."""
        if self.guard is not None and self.by_loss and not self._allowed(self._losses()):
            return False
        changes = (self.clip_value, self.clip_norm, self.tracks_norm, self.zero_non_finite)
        if self.scaler.is_enabled() and any(changes):
            self.scaler.unscale_(self.optimizer)
        factor = self.full * self.parallel.grad_divisor / total if self.weighted and total else 1.0
        if factor != 1.0:  # as one batch of just these samples
            torch._foreach_mul_(list(self._gradients()), factor)
        if self.zero_non_finite:
            for gradient in self._gradients():
                gradient.nan_to_num_(0.0, 0.0, 0.0)
        guarded = self.guard is not None and not self.by_loss
        if self.tracks_norm or self.clip_norm is not None:
            norm = evidence = total_norm(list(self._gradients()))
        elif guarded:
            evidence = finite_indicator(list(self._gradients()))
        if self.tracks_norm:
            self.norm = norm
        if guarded and not self._allowed(evidence):
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

    def _allowed(self, evidence: Tensor) -> bool:
        scaled = self.scaler.is_enabled()
        guard, optimizer = self.guard, self.optimizer
        return guard is None or guard.allows(evidence, optimizer, self.steps, scaled)

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

    def position(self) -> dict[str, Any]:
        """How far it is: plain values, to be put back by `put_back`."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return {"steps": self.steps, "schedule": self.schedule.state_dict(), "rates": rates}

    def put_back(self, position: dict[str, Any]) -> None:
        """The steps since then have not been made."""
        self.steps = position["steps"]
        self.schedule.load_state_dict(position["schedule"])
        for group, rate in zip(self.optimizer.param_groups, position["rates"], strict=True):
            group["lr"] = rate

    def load_state_dict(self, state: dict[str, Any], anew: bool = False) -> None:
        """Goes on from what `state_dict` gave.

        Args:
            state: As given.
            anew: With the rates, the schedule and the other settings that it has now; of the
                schedule as much is over as of the one that was saved.
        """
        whole, parameters = state["optimizer"], list(self._parameters())
        parts = {
            number: {n: shard_like(value, parameters[number]) for n, value in values.items()}
            for number, values in whole["state"].items()
        }
        if anew:
            whole = {**whole, "param_groups": self.optimizer.state_dict()["param_groups"]}
        self.optimizer.load_state_dict({**whole, "state": parts})
        if anew:
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

    def _learning(self) -> Iterable[Tensor]:
        return (parameter for parameter in self._parameters() if parameter.requires_grad)

    def _gradients(self) -> Iterable[Tensor]:
        return (p.grad for p in self._parameters() if p.grad is not None)


ONLY = ""  # the name of an optimization that has no other beside it


class Learning:
    """The optimizations of a task.

    Args:
        optimizations: By name; the names are those of parts of the model. A single one may be
            given as it is.
        on_nonfinite: What follows a loss or gradients that are no numbers; None looks at neither.
    """

    def __init__(
        self,
        optimizations: Mapping[str, Optimization] | Optimization,
        on_nonfinite: Policy | None = "stop",
    ) -> None:
        alone = isinstance(optimizations, Optimization)
        self.optimizations: dict[str, Optimization] = (
            {ONLY: optimizations} if alone else dict(optimizations)  # type: ignore[dict-item, arg-type]
        )
        first = next(iter(self.optimizations.values()))
        self.guard = Guard(on_nonfinite, first.device) if on_nonfinite else None
        for one in self.optimizations.values():
            one.guard = self.guard

    def __getitem__(self, name: str) -> Optimization:
        return self.optimizations[name]

    @property
    def only(self) -> Optimization:
        """The only one."""
        (optimization,) = self.optimizations.values()
        return optimization

    @property
    def steps(self) -> int:
        """How many steps the first optimizer has made."""
        return next(iter(self.optimizations.values())).steps

    @property
    def accumulate(self) -> int:
        """Batches to one step."""
        return next(iter(self.optimizations.values())).accumulate

    @property
    def is_between_steps(self) -> bool:
        """Whether no gradients wait for further batches."""
        return not any(one.batches for one in self.optimizations.values())

    @property
    def has_refused(self) -> bool:
        """Whether a step of the batch under way was not made, since something is no number."""
        return self.guard is not None and self.guard.refused

    @property
    def completes(self) -> bool:
        """Whether the next batch makes a step, if it is learned from once."""
        first = next(iter(self.optimizations.values()))
        return first.batches + 1 >= first.accumulate

    def rates(self) -> dict[str, float]:
        """The learning rates of the next step: `lr`, or `lr_<name>` of each."""
        return {column("lr", name): one.lr for name, one in self.optimizations.items()}

    def norms(self, count: int) -> dict[str, Mean]:
        """The norms of the gradients, where they are kept; batches without a step have none."""
        return {
            column("gradient_norm", name): _norm(one, count)
            for name, one in self.optimizations.items()
            if one.tracks_norm
        }

    def finish(self) -> None:
        """Uses what has accumulated; an epoch ends."""
        for optimization in self.optimizations.values():
            optimization.finish()

    def epoch_end(self, goal_value: float | None) -> None:
        """An epoch is over; `goal_value` is None where the goal was not measured in it."""
        for optimization in self.optimizations.values():
            optimization.schedule.epoch_end(goal_value)

    def position(self) -> dict[str, Any]:
        """How far all are."""
        return {name: one.position() for name, one in self.optimizations.items()}

    def put_back(self, position: dict[str, Any]) -> None:
        """The steps since then have not been made."""
        for name, one in self.optimizations.items():
            one.put_back(position[name])

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {name: one.state_dict() for name, one in self.optimizations.items()}

    def load_state_dict(self, state: dict[str, Any], anew: bool = False) -> None:
        """Goes on from what `state_dict` gave; `anew` as in `Optimization.load_state_dict`."""
        for name, one in self.optimizations.items():
            one.load_state_dict(state[name], anew)


def _norm(one: Optimization, count: int) -> Mean:
    if one.norm is None:
        return Mean(torch.zeros((), device=one.device), 0)
    return Mean(one.norm, 0 if one.batches else count)


def column(what: str, name: str) -> str:
    """`lr`, or `lr_generator` where there are several."""
    return f"{what}_{name}" if name else what
