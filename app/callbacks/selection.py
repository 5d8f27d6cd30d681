"""Decide when a callback acts, and which parts of batches and outputs it uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.losses.weighted_sum import LOGIT_LOSSES
from app.runtime.errors import UserError
from app.runtime.nested import Key, Nested, pick
from app.training.events import StageStart


def check_selection(stages: Sequence[str], allowed: Sequence[str], every_n_epochs: int) -> None:
    """Check the stages and the epoch interval of a callback.

    Args:
        stages: Stages that the user selected.
        allowed: Stages that the callback supports.
        every_n_epochs: Interval that the user selected.

    Raises:
        UserError: A stage is not allowed, or the interval is less than 1.
    """
    if not set(stages) <= set(allowed):
        raise UserError(f"stages={list(stages)!r}; allowed: {', '.join(allowed)}")
    if every_n_epochs < 1:
        raise UserError(f"every_n_epochs={every_n_epochs}; allowed: 1 or more")


def is_due(start: StageStart, every_n_epochs: int, config: dict[str, Any]) -> bool:
    """Whether to act in this epoch; always true for a stage that runs only once."""
    runs_once = start.stage == "test" or config["mode"] != "train"
    return runs_once or start.epoch % every_n_epochs == 0


def class_label(config: dict[str, Any], label: int) -> str:
    """Return the name of a class, or its number if the data has no names for it."""
    names = config["data"].get("class_names") or []
    return names[label] if 0 <= label < len(names) else str(label)


def classes_of_metric(
    config: dict[str, Any] | None, stage: str, metric: str, size: int
) -> list[str] | None:
    """Return the name of each class that a vector or matrix of a metric has values for.

    Args:
        config: Resolved configuration; None if there is none.
        stage: `train`, `valid` or `test`.
        metric: Name of the metric.
        size: Length of the vector, or side of the matrix.

    Returns:
        None if the values are not one per class, judging by the options of the metric.
    """
    nodes = (config or {}).get("metric", {}).get(stage) or {}
    node = nodes.get(metric) or nodes.get(metric.removesuffix("_per_class")) or {}
    node = node.get("metric", node)  # within an OutputMetric
    count = node.get("num_classes")
    if config is None or not isinstance(count, int):
        return None
    if size == count:
        first = 0
    elif size == count - 1 and str(node["_target_"]).startswith("app.metrics.segmentation."):
        first = 1  # without the background
    else:
        return None
    has_names = len(config["data"].get("class_names") or []) == count
    return [class_label(config, k) if has_names else str(k) for k in range(first, count)]


def configured_logit_outputs(config: dict[str, Any]) -> list[Key]:
    """Return the keys of the outputs that are class logits, judging by their loss functions."""
    names = {kind.__name__ for kind in LOGIT_LOSSES}
    terms = [term for term in config["loss"].values() if term]
    return [term.get("output") for term in terms if _function_name(term) in names]


def _function_name(term: dict[str, Any]) -> str:
    return str(term["function"]["_target_"]).rpartition(".")[2]


def pick_targets(batch: Nested, config: dict[str, Any]) -> Nested:
    """Return the targets of a batch; None if the data has none."""
    key: Key = config["data"]["targets"]
    return None if key is None else pick(batch, key)
