"""What of a run is watched: which stages and epochs, which parts of batches and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.losses.weighted_sum import LOGITS
from app.runtime.errors import UserError
from app.runtime.nested import Key, Nested, pick
from app.training.events import StageStart


def check_when(stages: Sequence[str], allowed: Sequence[str], every_n_epochs: int) -> None:
    """Refuses names that are no stage, and epochs that never come.

    Raises:
        UserError: Names what is allowed.
    """
    if not set(stages) <= set(allowed):
        raise UserError(f"stages={list(stages)!r}; allowed: {', '.join(allowed)}")
    if every_n_epochs < 1:
        raise UserError(f"every_n_epochs={every_n_epochs}; allowed: 1 or more")


def is_due(start: StageStart, every_n_epochs: int, config: dict[str, Any]) -> bool:
    """Whether it is the epoch's turn; a stage that comes but once in a run is always due."""
    comes_once = start.stage == "test" or config["mode"] != "train"
    return comes_once or start.epoch % every_n_epochs == 0


def class_outputs(config: dict[str, Any]) -> list[Key]:
    """The parts of the outputs that are logits of classes, as the loss terms show."""
    names = {kind.__name__ for kind in LOGITS}
    terms = [term for term in config["loss"].values() if term]
    return [term.get("output") for term in terms if _function_name(term) in names]


def _function_name(term: dict[str, Any]) -> str:
    return str(term["function"]["_target_"]).rpartition(".")[2]


def targets_of(batch: Nested, config: dict[str, Any]) -> Nested:
    """The targets in a batch; None where it has none."""
    key: Key = config["data"]["targets"]
    return None if key is None else pick(batch, key)
