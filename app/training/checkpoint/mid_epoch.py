"""An epoch of training that was cut, and goes on where it was."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from app.data.batch import Batch, BatchLoader
from app.distributed.collectives import gather_object, rank, world_size
from app.runtime.errors import UserError
from app.runtime.seed import rng_state, set_rng_state
from app.training.accumulator import StageAccumulator
from app.training.checkpoint.train_state import MISMATCH_ERRORS
from app.training.rank_sync import padded_batches

log = logging.getLogger(__name__)
EpochPosition = dict[str, Any]  # tensors and plain values


def save_position(rows: StageAccumulator, batches: int) -> EpochPosition:
    """Where in an epoch of training all ranks are: rows, what metrics hold, randomness."""
    mine = {"random": rng_state(), "metrics": rows.metrics.state_dict()}
    return {"batches": batches, "rows": rows.state_dict(), "ranks": gather_object(mine)}


def restore_position(rows: StageAccumulator, under_way: EpochPosition) -> None:
    """The rows and metrics go on from there."""
    ranks = under_way["ranks"]
    if len(ranks) != world_size():
        log.warning("the run was cut on %d ranks and goes on on %d", len(ranks), world_size())
    with _used():
        rows.load_state_dict(under_way["rows"])
        if len(ranks) == world_size():
            rows.metrics.load_state_dict(ranks[rank()]["metrics"])
        else:
            for part in ranks if rank() == 0 else []:
                rows.metrics.merge_state_dict(part["metrics"])


def remaining_batches(
    batches: BatchLoader, epoch: int, under_way: EpochPosition | None
) -> Iterator[tuple[Batch, bool]]:
    """The batches of an epoch; of one that was cut what is left, with its randomness."""
    steps = padded_batches(batches, epoch)
    if under_way is None:
        return steps
    for _ in islice(steps, under_way["batches"]):
        pass
    if len(under_way["ranks"]) == world_size():
        with _used():
            set_rng_state(under_way["ranks"][rank()]["random"])
    return steps


@contextmanager
def _used() -> Iterator[None]:
    try:
        yield
    except MISMATCH_ERRORS as error:
        raise UserError(
            f"what the state has of the epoch under way cannot be used, it is of other metrics or "
            f"damaged: {error!r}"
        ) from error
