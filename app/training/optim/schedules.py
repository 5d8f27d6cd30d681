"""Learning rate schedules that `torch.optim.lr_scheduler` does not have."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from app.runtime.errors import did_you_mean

DECAYS: dict[str, Callable[[float], float]] = {  # from 1 to 0, for the part of the decay so far
    "linear": lambda part: 1 - part,
    "cosine": lambda part: (1 + math.cos(math.pi * part)) / 2,
    "sqrt": lambda part: 1 - math.sqrt(part),
}


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
