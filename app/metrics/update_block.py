"""Updates of several steps at once: their batches are kept until one vectorized update of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from app.metrics.sum_metric import SumMetric, Sums
from app.runtime.nested import Nested

MAX_STEPS = 64
MIN_STEPS = 4  # fewer are not worth a block
MAX_BYTES = 4 * 2**20  # of the batches of a block, so that they stay in the cache of a processor
Form = tuple[torch.Size, torch.dtype, torch.Size, torch.dtype]


class UpdateBlock:
    """Copies of the outputs and targets of consecutive steps, for metrics that are sums.

    Args:
        outputs: Memory for the outputs, of shape (steps, N, ...).
        targets: Memory for the targets, of shape (steps, N, ...).
    """

    def __init__(self, outputs: Tensor, targets: Tensor) -> None:
        self.outputs, self.targets = outputs, targets
        self.num_steps = 0
        self.metrics: set[SumMetric] = set()
        self.sums: dict[SumMetric, Sums] = {}
        self.is_closed = False

    def add(self, output: Tensor, target: Tensor) -> None:
        """Copy the batch of the next step."""
        self.outputs[self.num_steps].copy_(output)
        self.targets[self.num_steps].copy_(target)
        self.num_steps += 1

    def close(self) -> None:
        """Update all metrics; the memory may be used again, and no step can be added."""
        if not self.is_closed:
            outputs, targets = self.outputs[: self.num_steps], self.targets[: self.num_steps]
            self.sums = {metric: metric.block_sums(outputs, targets) for metric in self.metrics}
            self.is_closed = True

    def step_sums(self, metric: SumMetric) -> StepSums:
        """Return what the last step adds to the states of a metric."""
        self.metrics.add(metric)
        return StepSums(self, metric, self.num_steps - 1)


@dataclass(frozen=True, eq=False)
class StepSums:
    """What a step adds to the states of a metric, computed together with the steps around it.

    Attributes:
        block: Block of the step.
        metric: Metric of the states.
        index: Position of the step in the block.
    """

    block: UpdateBlock
    metric: SumMetric
    index: int


MetricSums = Sums | StepSums


class UpdateBlocks:
    """The blocks of one part of the outputs and targets, one after another.

    A block begins with the second of two batches of the same form, so that batches of various forms
    are not copied.
    """

    def __init__(self) -> None:
        self.block: UpdateBlock | None = None
        self.form: Form | None = None

    def add(self, output: Nested, target: Nested) -> UpdateBlock | None:
        """Add the batch of a step; return its block, or None if it should be used alone."""
        if not isinstance(output, Tensor) or not isinstance(target, Tensor):
            return None
        form = (output.shape, output.dtype, target.shape, target.dtype)
        if form != self.form:
            self.form = form
            if self.block is not None:
                self.block.close()
            self.block = None
            return None
        if self.block is None:
            self.block = _new_block(output, target)
        elif self.block.is_closed or self.block.num_steps == len(self.block.outputs):
            self.block.close()
            self.block = UpdateBlock(self.block.outputs, self.block.targets)
        if self.block is not None:
            self.block.add(output, target)
        return self.block


def _new_block(output: Tensor, target: Tensor) -> UpdateBlock | None:
    """Return a block for batches of this form, or None if they are large."""
    num_steps = min(MAX_STEPS, MAX_BYTES // max(1, output.nbytes + target.nbytes))
    if num_steps < MIN_STEPS:
        return None
    outputs, targets = (part.new_empty(num_steps, *part.shape) for part in (output, target))
    return UpdateBlock(outputs, targets)


def stack_sums(steps: Sequence[MetricSums]) -> Sums:
    """Return what each step adds to the states of a metric, of shape (steps, ...) each."""
    runs = [_stack_run(list(run)) for _, run in groupby(steps, key=_block_of)]
    return runs[0] if len(runs) == 1 else tuple(map(torch.cat, zip(*runs, strict=True)))


def zeros_like_sums(step: MetricSums) -> Sums:
    """Return sums of the same form that count for nothing."""
    return step.metric.zeros() if isinstance(step, StepSums) else tuple(map(torch.zeros_like, step))


def _block_of(step: MetricSums) -> UpdateBlock | None:
    return step.block if isinstance(step, StepSums) else None


def _stack_run(steps: list[MetricSums]) -> Sums:
    """Stack the sums of steps that are all of one block, or of none."""
    blocked = [step for step in steps if isinstance(step, StepSums)]
    if not blocked:
        return tuple(map(torch.stack, zip(*steps, strict=True)))
    first, last = blocked[0], blocked[-1]
    first.block.close()
    states = first.block.sums[first.metric]
    if last.index - first.index == len(blocked) - 1:
        return tuple(state[first.index : last.index + 1] for state in states)
    return tuple(torch.stack([state[step.index] for step in blocked]) for state in states)
