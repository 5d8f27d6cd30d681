"""Learning rate schedules that keep the ratios of the learning rates of parameter groups.

`torch.optim.lr_scheduler` has some that set the same rate for all groups unless they get a list.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR

from app.runtime.errors import did_you_mean

DECAYS: dict[str, Callable[[float], float]] = {  # from 1 to 0, for the part of the decay so far
    "linear": lambda part: 1 - part,
    "cosine": lambda part: (1 + math.cos(math.pi * part)) / 2,
    "sqrt": lambda part: 1 - math.sqrt(part),
}


def one_cycle(
    optimizer: Optimizer,
    max_lr: float,
    total_steps: int,
    pct_start: float = 0.3,
    anneal_strategy: Literal["cos", "linear"] = "cos",
    cycle_momentum: bool = True,
    base_momentum: float = 0.85,
    max_momentum: float = 0.95,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    three_phase: bool = False,
) -> OneCycleLR:
    """Return torch's `OneCycleLR`, whose peak in each group is `max_lr` times its `lr_scale`."""
    return OneCycleLR(
        optimizer,
        [max_lr * scale for scale in lr_scales(optimizer)],
        total_steps,
        pct_start=pct_start,
        anneal_strategy=anneal_strategy,
        cycle_momentum=cycle_momentum,
        base_momentum=base_momentum,
        max_momentum=max_momentum,
        div_factor=div_factor,
        final_div_factor=final_div_factor,
        three_phase=three_phase,
    )


def cyclic(
    optimizer: Optimizer,
    base_lr: float,
    max_lr: float,
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular",
    gamma: float = 1.0,
    cycle_momentum: bool = True,
    base_momentum: float = 0.8,
    max_momentum: float = 0.9,
) -> CyclicLR:
    """Return torch's `CyclicLR`, whose bounds in each group are those times its `lr_scale`."""
    return CyclicLR(
        optimizer,
        [base_lr * scale for scale in lr_scales(optimizer)],
        [max_lr * scale for scale in lr_scales(optimizer)],
        step_size_up,
        step_size_down,
        mode,
        gamma,
        cycle_momentum=cycle_momentum,
        base_momentum=base_momentum,
        max_momentum=max_momentum,
    )


def lr_scales(optimizer: Optimizer) -> list[float]:
    """Return the learning rate of each group as a multiple of `optimizer.lr`."""
    return [group.get("lr_scale", 1.0) for group in optimizer.param_groups]


def warmup_stable_decay(
    optimizer: Optimizer,
    total_steps: int,
    decay: float = 0.2,
    decay_type: Literal["linear", "cosine", "sqrt"] = "linear",
    min_factor: float = 0.0,
) -> LambdaLR:
    """Keep the learning rates until the last part of the run, and then reduce them (WSD).

    Hu et al. 2024, "MiniCPM", section 4; the warm-up is that of `scheduler.warmup_steps`. `sqrt` is
    the shape "1-sqrt" of Haegele et al. 2024, "Scaling laws and compute-optimal training beyond
    fixed training durations".

    Args:
        optimizer: Optimizer whose learning rates are set.
        total_steps: Number of steps (or epochs) of the run.
        decay: Part of them in which the rates fall.
        decay_type: How they fall.
        min_factor: Factor that they fall to, at the end of the run.

    Raises:
        ValueError: An argument is not allowed.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay={decay} must be above 0 and at most 1")
    if decay_type not in DECAYS:
        allowed = f"allowed: {', '.join(DECAYS)}{did_you_mean(decay_type, DECAYS)}"
        raise ValueError(f"decay_type={decay_type!r} is not valid; {allowed}")
    start = total_steps * (1 - decay)

    def factor(step: int) -> float:
        part = min(max(step - start, 0.0) / (total_steps - start), 1.0)
        return min_factor + (1 - min_factor) * DECAYS[decay_type](part)

    return LambdaLR(optimizer, factor)


def cosine_to_constant(optimizer: Optimizer, steps: int, factor: float) -> LambdaLR:
    """Reduce the learning rates along a cosine, and keep them then, for weight averaging (SWA).

    Args:
        optimizer: Optimizer whose learning rates are set.
        steps: Number of steps (or epochs) in which they fall.
        factor: Factor that they fall to.
    """

    def factor_at(step: int) -> float:
        return factor + (1 - factor) * DECAYS["cosine"](min(step / max(steps, 1), 1.0))

    return LambdaLR(optimizer, factor_at)
