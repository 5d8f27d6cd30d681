"""Metrics over the batches of a stage and over ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor

from app.metrics.images import (
    FeatureDistance,
    FrechetInceptionDistance,
    KernelInceptionDistance,
)
from app.metrics.segmentation import OverlapMetric, PartialDice
from app.metrics.stage_metrics import StageMetrics
from app.training.accumulator import StageAccumulator
from app.training.history import Point
from app.training.step_values import average
from tests.support.metrics import (
    Projection,
    evaluate,
    make_classification,
    make_images,
    make_metric,
    make_regression,
    make_segmentation,
)
from tests.unit.metrics.test_metric_configs import CLASSIFICATION, REGRESSION

Case = tuple[dict[str, torchmetrics.Metric], tuple[Tensor, Tensor]]  # metrics and their inputs
CASES: dict[str, Callable[[], Case]] = {
    "classification": lambda: (
        {name: make_metric(name) for name in CLASSIFICATION},
        make_classification(),
    ),
    "regression": lambda: ({name: make_metric(name) for name in REGRESSION}, make_regression(4)),
    "segmentation": lambda: (
        {
            "partial": PartialDice(5, [1, 2]),
            **{
                name: make_metric(name, 5)
                for name in ("dice", "dice_per_class", "mean_iou", "instance_iou", "hd95")
            },
        },
        make_segmentation(2),
    ),
    "images": lambda: (
        {
            "psnr": make_metric("psnr"),
            "ssim": make_metric("ssim"),
            "fid": FrechetInceptionDistance(Projection(size=12), image_size=(3, 12, 12)),
            "kid": KernelInceptionDistance(Projection(size=12), subset_size=12),
            "distance": FeatureDistance(Projection(size=12)),
        },
        make_images(12),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_stage_metrics_of_unequal_batches_match_one_batch(case: str) -> None:
    metrics, (outputs, targets) = CASES[case]()
    n = len(targets)
    expected = {name: evaluate(metric, outputs, targets, [n]) for name, metric in metrics.items()}
    stage = StageMetrics(CASES[case]()[0])
    accumulator = StageAccumulator(stage, torch.device("cpu"))
    sizes = [n - 3, 2, 1]
    for output, target in zip(outputs.split(sizes), targets.split(sizes), strict=True):
        step = {"loss": average(output.mean(), len(target)), **stage.update(output, target)}
        accumulator.add(step)
    result = accumulator.result("test", Point(1))
    for name in metrics:
        actual = result.arrays[name] if name in result.arrays else result.row[name]
        np.testing.assert_allclose(actual, expected[name], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_merged_metrics_of_two_ranks_match_one_rank(case: str) -> None:
    metrics, (outputs, targets) = CASES[case]()
    for name, metric in metrics.items():
        if name == "r2":  # a wrapper, whose inner metric is merged separately
            continue
        expected = evaluate(metric, outputs, targets, [len(targets)])
        first, second = (CASES[case]()[0][name] for _ in range(2))
        first.update(outputs[:4], targets[:4])
        second.update(outputs[4:], targets[4:])
        first.merge_state(second)
        actual = first.compute().numpy()
        np.testing.assert_allclose(actual, expected, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("case", ["segmentation", "images"])
def test_metric_update_does_not_synchronize_with_device(case: str) -> None:
    metrics, batch = CASES[case]()
    outputs, targets = (
        tensor.to("meta") for tensor in batch
    )  # tensors without data; reading one raises
    for metric in metrics.values():
        metric.to("meta").update(outputs, targets)


def test_segmentation_metrics_of_the_same_states_are_updated_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outputs, targets = make_segmentation(2)
    names = ("dice", "dice_per_class", "mean_iou")
    stage = StageMetrics({name: make_metric(name, 5) for name in names})
    updates: list[object] = []
    update = OverlapMetric.update
    monkeypatch.setattr(OverlapMetric, "update", lambda *args: updates.append(update(*args)))
    step_sums = stage.update(outputs, targets)
    assert len(updates) == 1
    assert step_sums["dice"] == step_sums["dice_per_class"] == step_sums["mean_iou"]


def test_names_of_parts_cannot_lead_out_of_a_folder() -> None:
    """Metrics choose them, and they become names of files."""
    matrix = torchmetrics.classification.MulticlassConfusionMatrix(2)
    named = torchmetrics.wrappers.ClasswiseWrapper(matrix, labels=["a b", "\\x"], prefix="/../")
    stage = StageMetrics({"x": named})
    stage.update(torch.eye(2), torch.tensor([0, 1]))
    assert list(stage.compute_accumulating()) == ["x__.._a b", "x__..__x"]
