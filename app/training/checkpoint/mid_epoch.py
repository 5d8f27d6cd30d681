"""Save and restore the position within a training epoch, so that it resumes where it stopped."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from app.data.batch import BatchLoader
from app.distributed.collectives import gather_object, rank, world_size
from app.runtime.errors import UserError
from app.runtime.seed import rng_state, set_rng_state
from app.training.accumulator import StageAccumulator
from app.training.checkpoint.train_state import MISMATCH_ERRORS
from app.training.rank_sync import StepBatch, step_batches

log = logging.getLogger(__name__)
EpochPosition = dict[str, Any]  # tensors and plain values


@dataclass
class PausedEpoch:
    """An epoch that continues after a validation.

    Attributes:
        batches: Its remaining batches; None reads the data again from the beginning.
        rng_state: State of the random number generators at this position.
        rng_state_after: The same, but after the next batch is read if it has been.
    """

    batches: Iterator[StepBatch] | None
    rng_state: dict[str, Any]
    rng_state_after: dict[str, Any]


def pause(batches: Iterator[StepBatch]) -> PausedEpoch | None:
    """Pause an epoch before its next batch; None if there is no further batch.

    All ranks must call this at the same position.
    """
    state = rng_state()
    following = next(batches, None)
    if following is None:
        return None
    return PausedEpoch(chain([following], batches), state, rng_state())


def save_position(
    accumulator: StageAccumulator, batches: int, rng: dict[str, Any] | None = None
) -> EpochPosition:
    """Return the position of all ranks in the epoch: rows, metric states and RNG states.

    Every rank must call this.

    Args:
        accumulator: Rows and metrics of the epoch, or of its current part, so far.
        batches: Number of batches trained on in this epoch.
        rng: State of the random number generators; None is the current one.
    """
    local = {"rng_state": rng or rng_state(), "metrics": accumulator.metrics.state_dict()}
    return {"batches": batches, "rows": accumulator.state_dict(), "ranks": gather_object(local)}


def restore_position(accumulator: StageAccumulator, position: EpochPosition) -> None:
    """Restore the rows and metric states of an interrupted epoch.

    If the number of ranks has changed, rank 0 takes over the metric states of all ranks.

    Raises:
        UserError: The position does not match the metrics, or is damaged.
    """
    ranks = position["ranks"]
    if len(ranks) != world_size():
        log.warning(
            "the number of ranks has changed: saved on %d, resumed on %d", len(ranks), world_size()
        )
    with _mismatch_as_user_error():
        accumulator.load_state_dict(position["rows"])
        if len(ranks) == world_size():
            accumulator.metrics.load_state_dict(ranks[rank()]["metrics"])
        else:
            for part in ranks if rank() == 0 else []:
                accumulator.metrics.merge_state_dict(part["metrics"])


def remaining_batches(
    batches: BatchLoader,
    epoch: int,
    position: EpochPosition | None,
    paused: PausedEpoch | None = None,
) -> Iterator[StepBatch]:
    """Return the batches of an epoch from a position on.

    The RNG states are restored, too, if the number of ranks is the same.

    Args:
        batches: Loader of the training data.
        epoch: Number of the epoch.
        position: Where the epoch was interrupted; None returns all its batches.
        paused: What this process has kept of the epoch; None if it was resumed from a checkpoint.

    Raises:
        UserError: The position is damaged.
    """
    if position is None:
        return step_batches(batches, epoch)
    remaining = paused.batches if paused else None
    if remaining is None:
        remaining = step_batches(batches, epoch)
        for _ in islice(remaining, position["batches"]):
            pass
    if paused:
        set_rng_state(paused.rng_state_after if paused.batches else paused.rng_state)
    elif len(position["ranks"]) == world_size():
        with _mismatch_as_user_error():
            set_rng_state(position["ranks"][rank()]["rng_state"])
    return remaining


@contextmanager
def _mismatch_as_user_error() -> Iterator[None]:
    try:
        yield
    except MISMATCH_ERRORS as error:
        raise UserError(
            "the saved position within the epoch cannot be restored: it belongs to other "
            f"metrics or is damaged: {error!r}"
        ) from error
