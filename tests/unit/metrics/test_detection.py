"""Mean average precision of padded batches."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from app.metrics.detection import MeanAveragePrecision
from app.metrics.stage_metrics import StageMetrics
from app.runtime.errors import UserError

pytest.importorskip("pycocotools")
Boxes = dict[str, Tensor]
A, B, C = [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 40.0, 30.0], [50.0, 0.0, 60.0, 30.0]


def padded(boxes: list[list[float]], labels: list[int], scores: list[float]) -> Boxes:
    """Return the boxes of one image, padded to four."""
    missing = 4 - len(boxes)
    return {
        "boxes": torch.tensor([boxes + [[0.0] * 4] * missing]),
        "labels": torch.tensor([labels + [-1] * missing]),
        "scores": torch.tensor([scores + [0.0] * missing]),
        "crowd": torch.zeros(1, 4, dtype=torch.bool),
    }


def values(pairs: list[tuple[Boxes, Boxes]], num_classes: int = 3) -> dict[str, Any]:
    """Return the metric of batches of one image, as a stage computes it."""
    metrics = StageMetrics({"map": MeanAveragePrecision(num_classes)})
    metrics.reset()
    for found, true in pairs:
        metrics.update(found, true)
    return {name: value.tolist() for name, value in metrics.compute_accumulating().items()}


def test_perfect_and_missing_boxes_have_known_precision() -> None:
    true = padded([A, B], [0, 1], [1, 1])
    result = values([(padded([A, B], [0, 1], [0.9, 0.8]), true)])
    assert {*result} == {"map", "map_50", "map_75", "map_per_class"}
    assert result["map"] == result["map_50"] == result["map_75"] == 1
    assert result["map_per_class"][:2] == [1, 1]
    assert result["map_per_class"][2] != result["map_per_class"][2]  # no boxes: NaN
    half = values([(padded([A], [0], [0.9]), true)])
    assert half["map"] == 0.5
    shifted = padded([[0, 0, 10, 8.2], B], [0, 1], [0.9, 0.8])  # an IoU of 0.82
    result = values([(shifted, true)])
    assert result["map_75"] == 1
    assert result["map"] == pytest.approx((0.7 + 1) / 2)


def test_wrong_class_and_false_boxes_cost_precision() -> None:
    true = padded([A], [0], [1])
    assert values([(padded([A], [1], [0.9]), true)])["map"] == 0
    assert values([(padded([C, A], [0, 0], [0.9, 0.8]), true)])["map"] == 0.5


def test_boxes_in_crowds_do_not_count() -> None:
    true = padded([A, C], [0, 0], [1, 1])
    found = padded([C, A], [0, 0], [0.9, 0.8])
    only_first = padded([C], [0], [0.9])
    assert values([(only_first, true)])["map"] == pytest.approx(0.505, abs=1e-3)
    true["crowd"][0, 1] = True
    assert values([(found, true)])["map"] == 1  # the box in the crowd is not wrong
    assert values([(only_first, true)])["map"] == 0  # nor right


def test_data_without_boxes_have_no_precision() -> None:
    empty = padded([], [], [])
    result = values([(empty, empty)])
    assert all(result[name] != result[name] for name in ("map", "map_50", "map_75"))


def test_order_of_images_does_not_change_ties() -> None:
    # With equal scores, COCO's evaluation ranks boxes in the order of images.
    right = padded([A], [0], [0.5]), padded([A], [0], [1])
    wrong = padded([C], [0], [0.5]), padded([B], [0], [1])
    assert str(values([right, wrong])) == str(values([wrong, right]))  # with NaN


def test_state_of_a_stage_is_saved_and_restored() -> None:
    true = padded([A, B], [0, 1], [1, 1])
    metrics = StageMetrics({"map": MeanAveragePrecision(2)})
    metrics.reset()
    metrics.update(padded([A], [0], [0.9]), true)
    other = StageMetrics({"map": MeanAveragePrecision(2)})
    other.reset()
    other.load_state_dict(metrics.state_dict())
    other.update(padded([A, B], [0, 1], [0.9, 0.8]), true)
    assert other.compute_accumulating()["map"].item() == pytest.approx(0.75, abs=0.01)


def test_missing_library_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(UserError, match=r'pip install "torch-experiment-app\[detection\]"'):
        MeanAveragePrecision(2)
