"""Optimizer wrapper: backward, gradient accumulation, clipping, finite check, step and schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from app.distributed.collectives import (
    all_reduce,
    all_reduce_async,
    all_reduce_tensor_async,
)
from app.distributed.strategies import (
    SingleDevice,
    local_tensor,
    nonfinite_indicator,
    shard_like,
    split_dtensors,
    total_norm,
)
from app.runtime.errors import UserError
from app.training.optim.adaptive_clipping import clip_gradients_adaptively
from app.training.optim.finite_check import (
    FiniteCheck,
    NonFiniteAction,
    fill_momentum_buffers,
    is_fused,
)
from app.training.optim.lr_schedule import LRSchedule
from app.training.optim.parameter_groups import check_same_groups
from app.training.step_values import Average

# Wait for the number of samples and the losses over all ranks; see `OptimWrapper`.
Reductions = tuple[Callable[[], float], Callable[[], list[Tensor]]]
HostState = tuple[int, dict[str, Any], list[dict[str, Any]]]
SINGLE = ""  # name of the wrapper in a dict that has only one


class OptimWrapper:
    """Turns losses into optimizer steps.

    A training step calls `step(loss, num_samples)`. The wrapper runs the backward pass, accumulates
    gradients over batches and ranks, clips them, checks them for NaN and infinity, and steps the
    optimizer, the gradient scaler and the learning rate schedule.

    Args:
        optimizer: Optimizer of the parameters.
        schedule: Schedule of its learning rate; None keeps the learning rate constant.
        scaler: Gradient scaler for fp16; None, or a disabled one, for all other precisions.
        batch_size: Number of samples in a full batch; only used if batches are accumulated or
            gradients are reduced over ranks.
        accumulate: Number of batches per optimizer step.
        clip_norm: Maximum total norm of the gradients; None does not clip.
        clip_value: Maximum absolute value of each gradient element; None does not clip.
        owns_all_parameters: Whether the optimizer has all trainable parameters. If not, the
            backward pass is limited to its own, so that other parameters get no gradient from
            this loss.
        tracks_grad_norm: Whether `grad_norm` is computed, before clipping.
        zero_non_finite: Whether NaN and infinite gradient elements are set to 0, before clipping.
        strategy: How gradients are reduced over ranks; None for a single device.
        clip_agc: Maximum ratio of the norms of gradient and weights, for each unit; None does not
            clip. See `clip_gradients_adaptively`.
        agc_excluded: Parameters whose gradients that does not clip.

    Attributes:
        finite_check: Checks the loss and the gradients before each step.
        losses: Losses since the last step, of batches that count; empty if they are not checked.
        grad_norm: Total norm of the gradients in the last step; None before the first one.
        steps: Number of optimizer steps taken.
        batches: Number of batches accumulated since the last step.
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
        clip_agc: float | None = None,
        agc_excluded: Iterable[Tensor] = (),
    ) -> None:
        self.optimizer, self.schedule = optimizer, schedule or LRSchedule(optimizer)
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.accumulate, self.full_batch_size = accumulate, batch_size * accumulate
        self.clip_norm, self.clip_value = clip_norm, clip_value
        self.owns_all_parameters, self.tracks_grad_norm = owns_all_parameters, tracks_grad_norm
        self.zero_non_finite = zero_non_finite
        self.clip_agc, self.agc_excluded = clip_agc, {*agc_excluded}
        self.strategy = strategy or SingleDevice(torch.nn.Module())
        # Batches of unequal size must count by their samples once gradients are summed.
        self.weights_by_samples = accumulate > 1 or self.strategy.is_distributed
        self.finite_check = FiniteCheck(None)
        self.losses: list[Tensor] = []
        self.grad_norm: Tensor | None = None
        self.steps = self.batches = self.samples = 0
        self.reductions: Reductions | None = None  # of the current step, once they have begun
        self.total_weight: Tensor | None = None  # on this rank, if it is not that of the samples
        self.cached_parameters: list[Tensor] = []
        self.num_groups = 0  # of the cached parameters
        self.is_sharded = any(isinstance(parameter, DTensor) for parameter in self.parameters)
        self.skipped_steps: Tensor | None = None  # in this epoch by the device
        self.epoch_start = self.host_state()

    @property
    def lrs(self) -> dict[str, float]:
        """Learning rates of the next step by name of the parameter group; the default one has none.

        Of a group with several layers it is the rate of the last one.
        """
        rates: dict[str, float] = {}
        for group in self.optimizer.param_groups:
            rates.setdefault(group.get("name", ""), float(group["lr"]))
        return rates

    def step(self, loss: Tensor, num_samples: int, weight: Tensor | None = None) -> None:
        """Backpropagate a loss, and step the optimizer once enough batches are accumulated.

        Args:
            loss: Scalar, the mean loss over the samples of the batch on this rank.
            num_samples: Number of samples in the batch.
            weight: How many samples the batch counts for in the mean over accumulated batches and
                ranks, a scalar on the device, such as the sum of the class weights of its
                targets; None is `num_samples`. Either all batches have one or none.

        Raises:
            UserError: If the loss does not depend on a trainable parameter.
        """
        count = 0 if self.strategy.is_padding else num_samples
        self.batches += 1
        self.samples += count
        if self.finite_check.policy is not None and not self.strategy.is_padding:
            self.losses.append(loss.detach())  # gradients may be finite even if the loss is not
        if self.batches == self.accumulate:
            self.reductions = self._start_reductions()  # they overlap with the backward pass
        self.backward(loss, count, weight)
        if self.batches == self.accumulate:
            self.apply()

    def _start_reductions(self) -> Reductions:
        """Start to sum the number of samples and the losses over all ranks."""
        samples = all_reduce_async(self.samples)
        if self.finite_check.policy is None or not self.strategy.is_distributed:
            return samples, lambda: self.losses
        zero_or_nan = torch.zeros((), device=self.device)
        for loss in self.losses:
            zero_or_nan += loss * 0
        total = all_reduce_tensor_async(zero_or_nan)
        return samples, lambda: [total()]

    def backward(self, loss: Tensor, count: int, weight: Tensor | None) -> None:
        """Accumulate the gradients of a loss; frozen parameters get none.

        Args:
            loss: See `step`.
            count: Number of samples in the batch; 0 if it is padding.
            weight: See `step`.
        """
        if not any(parameter.requires_grad for parameter in self.parameters):
            return
        if not loss.requires_grad:
            raise UserError("loss: it does not depend on any trainable parameter")
        if self.weights_by_samples:
            loss = loss * (self._batch_weight(count, weight) / self.full_batch_size)
        with _without_autocast(loss.device.type):
            scaled = loss if self.scaler is None else self.scaler.scale(loss)
            scaled.backward(inputs=None if self.owns_all_parameters else self.trainable)

    def _batch_weight(self, count: int, weight: Tensor | None) -> Tensor | int:
        """Return the weight of a batch, and add it to the total weight on this rank."""
        if weight is None:
            return count
        weight = torch.zeros_like(weight) if self.strategy.is_padding else weight
        earlier = 0 if self.total_weight is None else self.total_weight
        self.total_weight = earlier + weight.float()  # a new tensor, as it is reduced in place
        return weight

    def flush(self) -> None:
        """Step with the gradients of an incomplete accumulation, at the end of an epoch."""
        if self.batches:
            self.apply()

    def apply(self) -> None:
        """Reduce the accumulated gradients over ranks, step the optimizer and zero them."""
        total_samples, all_losses = self.reductions or self._start_reductions()
        total, losses = total_samples(), all_losses()
        self.strategy.all_reduce_gradients(self.parameters)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        has_stepped = self._apply_gradients(gradients, total, losses) if gradients else True
        self.strategy.zero_grad(self.parameters)
        if torch.is_autocast_enabled(self.device.type):
            torch.clear_autocast_cache()  # it would keep the old weights until autocast ends
        if has_stepped:
            self.count_step()
        self.batches = self.samples = 0
        self.reductions, self.total_weight, self.losses = None, None, []

    def count_step(self) -> None:
        """Advance the step count and the learning rates after a step."""
        self.schedule.on_step_end()
        self.steps += 1

    def _apply_gradients(self, gradients: list[Tensor], total: float, losses: list[Tensor]) -> bool:
        """Clip and step, unless the finite check refuses; return whether a step was made.

        If the norm is needed it is computed once, for the table, the check and the clipping.

        Args:
            gradients: All gradients of the optimizer.
            total: Number of samples over all batches and ranks.
            losses: Losses to check; their values are not changed.
        """
        checks = self.finite_check.policy is not None
        # Gradients that are not finite are allowed if they are zeroed, or left to the scaler.
        checks_loss_only = self.zero_non_finite or self.scaler is not None
        if checks and checks_loss_only and not self._may_step(nonfinite_indicator(losses)):
            return False
        self._finish_gradients(gradients, total)
        needs_norm = self.tracks_grad_norm or self.clip_norm is not None
        norm = total_norm(gradients) if needs_norm else None
        self.grad_norm = norm if self.tracks_grad_norm else None
        if checks and not checks_loss_only:
            tensors = [*losses, *gradients] if norm is None else [*losses, norm]
            if not self._may_step(nonfinite_indicator(tensors)):
                return False
        self._clip_gradients(gradients, norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return True

    def _finish_gradients(self, gradients: list[Tensor], total: float) -> None:
        """Turn accumulated and scaled gradients into those of the mean over all samples."""
        clips = self.clip_value or self.clip_norm or self.clip_agc
        if self.scaler and (clips or self.tracks_grad_norm or self.zero_non_finite):
            self.scaler.unscale_(self.optimizer)
        if self.weights_by_samples:
            self._normalize_gradients(gradients, total)
        if self.zero_non_finite:
            for gradient in gradients:
                gradient.nan_to_num_(0.0, 0.0, 0.0)

    def _clip_gradients(self, gradients: list[Tensor], norm: Tensor | None) -> None:
        """Clip by value, by unit and by norm; `norm` is that of all gradients, if known."""
        if self.clip_value is not None:
            torch.nn.utils.clip_grad_value_(self.parameters, self.clip_value)
            norm = None
        if self.clip_agc is not None:
            clipped = (p for p in self.parameters if p not in self.agc_excluded)
            clip_gradients_adaptively(clipped, self.clip_agc)
            norm = None
        if self.clip_norm is not None:
            norm = total_norm(gradients) if norm is None else norm
            for parameters in split_dtensors(self.parameters):
                torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)

    def _normalize_gradients(self, gradients: list[Tensor], total: float) -> None:
        """Make the gradients those of the mean over the samples that were there."""
        expected = self.full_batch_size * self.strategy.grad_divisor
        gradients = [local_tensor(gradient) for gradient in gradients]
        if self.total_weight is not None:
            weight = all_reduce(self.total_weight)
            torch._foreach_mul_(gradients, expected / weight.where(weight > 0, 1))
        elif total and total != expected:
            torch._foreach_mul_(gradients, expected / total)

    def _may_step(self, indicator: Tensor) -> bool:
        """Return whether to step; the device may still skip the step of a fused optimizer.

        Args:
            indicator: 0 if and only if the loss and the gradients are finite, on all ranks.
        """
        # The first step is not left to the device: fused SGD has no momentum buffers before it.
        # A scaler sets `found_inf` itself; the shards of a parameter are not stepped as one.
        check, can_defer = self.finite_check, self.steps > 0 and self.scaler is None
        if not (check.defers and can_defer and is_fused(self.optimizer)) or self.is_sharded:
            return check.is_finite(indicator)
        is_skipped = check.defer(indicator, self.optimizer)
        if self.skipped_steps is None:
            self.skipped_steps = torch.zeros_like(is_skipped)
        self.skipped_steps.add_(is_skipped)
        return True

    def on_epoch_start(self) -> None:
        """Remember the step count and the learning rates, for `undo_skipped`."""
        self.epoch_start = self.host_state()
        if self.skipped_steps is not None:
            self.skipped_steps.zero_()

    def host_state(self) -> HostState:
        """Return the step count, the schedule and the options of the parameter groups."""
        groups = [dict(group) for group in self.optimizer.param_groups]
        return self.steps, self.schedule.state_dict(), groups

    def restore_host_state(self, state: HostState) -> None:
        """Restore what `host_state` returned."""
        self.steps, schedule, groups = state
        self.schedule.load_state_dict(schedule)
        for group, earlier in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(earlier)

    def undo_skipped(self) -> None:
        """Set the step count and the learning rates back to before the steps the device skipped.

        They are those of the start of the epoch, advanced by the steps that were made.
        """
        skipped = 0 if self.skipped_steps is None else int(self.skipped_steps)
        if not skipped:
            return
        end = self.steps - skipped
        self.restore_host_state(self.epoch_start)
        self.schedule.fast_forward(end - self.steps)
        self.steps = end

    def state_dict(self) -> dict[str, Any]:
        """Return the state of optimizer, schedule and scaler: tensors and plain values."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any], reset_schedule: bool = False) -> None:
        """Restore the state that `state_dict` returned.

        Args:
            state: State of optimizer, schedule and scaler.
            reset_schedule: Whether to keep the current learning rates, schedule and optimizer
                settings, and fast-forward the schedule to the saved number of steps.

        Raises:
            UserError: The saved state has a parameter in another group.
        """
        check_same_groups(state["optimizer"]["param_groups"], self.optimizer.param_groups)
        full_state, parameters = state["optimizer"], self.parameters
        shards = {
            number: {n: shard_like(value, parameters[number]) for n, value in values.items()}
            for number, values in full_state["state"].items()
        }
        if reset_schedule:
            full_state = {**full_state, "param_groups": self.optimizer.state_dict()["param_groups"]}
        self.optimizer.load_state_dict({**full_state, "state": shards})
        fill_momentum_buffers(self.optimizer)
        if reset_schedule:
            self.schedule.fast_forward(state["steps"])
        else:
            self.schedule.load_state_dict(state["schedule"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.steps = state["steps"]

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.parameters[0].device

    @property
    def parameters(self) -> list[Tensor]:
        """Parameters of the optimizer, of all groups it has by now."""
        groups = self.optimizer.param_groups
        if len(groups) != self.num_groups:
            self.cached_parameters = [p for group in groups for p in group["params"]]
            fill_momentum_buffers(self.optimizer)
            self.num_groups = len(groups)
        return self.cached_parameters

    @property
    def trainable(self) -> list[Tensor]:
        """Parameters that are not frozen at the moment."""
        return [parameter for parameter in self.parameters if parameter.requires_grad]


class OptimWrapperDict:
    """The optimizer wrappers of a task, by name.

    A task with several optimizers, such as a GAN, steps each of them by name:
    `self.optimizers["generator"].step(loss, num_samples)`.

    Args:
        wrappers: Wrappers by name; the names are those of submodules of the model. A single
            wrapper may be given without a name.
        on_nonfinite: What to do if a loss or gradient is NaN or infinite; None disables the check.
    """

    def __init__(
        self,
        wrappers: Mapping[str, OptimWrapper] | OptimWrapper,
        on_nonfinite: NonFiniteAction | None = "stop",
    ) -> None:
        is_single = isinstance(wrappers, OptimWrapper)
        self.wrappers: dict[str, OptimWrapper] = (
            {SINGLE: wrappers} if is_single else dict(wrappers)  # type: ignore[dict-item, arg-type]
        )
        first = next(iter(self.wrappers.values()))
        self.finite_check = FiniteCheck(on_nonfinite, first.device)
        for wrapper in self.wrappers.values():
            wrapper.finite_check = self.finite_check

    def __getitem__(self, name: str) -> OptimWrapper:
        return self.wrappers[name]

    @property
    def single(self) -> OptimWrapper:
        """The only wrapper; raises ValueError if there are several."""
        (wrapper,) = self.wrappers.values()
        return wrapper

    @property
    def steps(self) -> int:
        """Number of steps that the first optimizer has made."""
        return next(iter(self.wrappers.values())).steps

    @property
    def accumulate(self) -> int:
        """Number of batches per optimizer step."""
        return next(iter(self.wrappers.values())).accumulate

    @property
    def batches(self) -> int:
        """Number of batches that the first optimizer has accumulated since its last step."""
        return next(iter(self.wrappers.values())).batches

    @property
    def at_step_boundary(self) -> bool:
        """Whether no wrapper holds the gradients of an incomplete accumulation."""
        return not any(wrapper.batches for wrapper in self.wrappers.values())

    @property
    def steps_next(self) -> bool:
        """Whether the next batch completes an accumulation, if each batch is used once."""
        first = next(iter(self.wrappers.values()))
        return first.batches + 1 >= first.accumulate

    def lrs(self) -> dict[str, float]:
        """Return the learning rates of the next step as columns.

        They are `lr`, `lr_<group>`, `lr_<optimizer>` and `lr_<optimizer>_<group>`.
        """
        return {
            column_name(column_name("lr", name), group): lr
            for name, wrapper in self.wrappers.items()
            for group, lr in wrapper.lrs.items()
        }

    def grad_norms(self, count: int) -> dict[str, Average]:
        """Return the tracked gradient norms as columns, empty for batches without a step.

        Args:
            count: Number of samples in the batch.
        """
        return {
            column_name("gradient_norm", name): _grad_norm(wrapper, count)
            for name, wrapper in self.wrappers.items()
            if wrapper.tracks_grad_norm
        }

    def on_epoch_start(self, reads_every_step: bool) -> None:
        """Prepare for an epoch of training.

        Args:
            reads_every_step: Whether no step may be left to the device to skip.
        """
        self.finite_check.reset(reads_every_step)
        for wrapper in self.wrappers.values():
            wrapper.on_epoch_start()

    def undo_skipped(self) -> None:
        """Undo what the host did after the steps of this epoch that the device skipped."""
        for wrapper in self.wrappers.values():
            wrapper.undo_skipped()

    def flush(self) -> None:
        """Step with the gradients of incomplete accumulations, at the end of an epoch."""
        for wrapper in self.wrappers.values():
            wrapper.flush()

    def on_epoch_end(self, goal_value: float | None, is_complete: bool = True) -> None:
        """Update all learning rates after an epoch; see `LRSchedule.on_epoch_end`.

        Args:
            goal_value: Value of the goal's metric; None if it was not measured.
            is_complete: Whether the epoch is complete, and not only validated within.
        """
        for wrapper in self.wrappers.values():
            if is_complete:
                wrapper.schedule.on_epoch_end(goal_value)
            else:
                wrapper.schedule.on_validation(goal_value)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all wrappers: tensors and plain values."""
        return {name: wrapper.state_dict() for name, wrapper in self.wrappers.items()}

    def load_state_dict(self, state: dict[str, Any], reset_schedule: bool = False) -> None:
        """Restore the states that `state_dict` returned; see `OptimWrapper.load_state_dict`."""
        for name, wrapper in self.wrappers.items():
            wrapper.load_state_dict(state[name], reset_schedule)


def _grad_norm(wrapper: OptimWrapper, count: int) -> Average:
    if wrapper.grad_norm is None:
        return Average(torch.zeros((), device=wrapper.device), 0)
    return Average(wrapper.grad_norm, 0 if wrapper.batches else count)


def column_name(prefix: str, name: str) -> str:
    """Return `lr`, or `lr_generator` if there is a name."""
    return f"{prefix}_{name}" if name else prefix


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context that disables autocast, which a backward pass must not use."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
