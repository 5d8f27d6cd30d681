"""Segmentation metrics, compared with MONAI and scikit-learn."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance
from sklearn import metrics as sklearn
from torch import Tensor
from torch.nn.functional import one_hot

from app.metrics.segmentation import (
    DiceScore,
    HausdorffDistance95,
    InstanceIoU,
    MeanIoU,
    PartialDice,
)
from app.runtime.errors import UserError
from tests.support.metrics import (
    Array,
    assert_metric_equals,
    evaluate,
    make_metric,
    make_segmentation,
)


def to_one_hot(labels: Tensor) -> Tensor:
    return one_hot(labels, 5).movedim(-1, 1)


@pytest.fixture(params=[2, 3])
def maps(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    return make_segmentation(request.param)


def monai_dice(outputs: Tensor, targets: Tensor) -> Array:
    """Return MONAI's Dice of all pixels as one image; NaN for classes that do not occur."""
    pixels = [to_one_hot(labels).movedim(1, 0).reshape(1, 5, -1) for labels in (outputs, targets)]
    scores: Array = compute_dice(*pixels, include_background=True).numpy()[0]
    return scores


def test_dice_matches_monai(maps: tuple[Tensor, Tensor]) -> None:
    expected = monai_dice(maps[0].argmax(1), maps[1])
    assert np.isnan(expected).tolist() == [False, False, False, False, True]
    assert_metric_equals(make_metric("dice", 5), *maps, expected[1:4].mean())
    assert_metric_equals(
        make_metric("dice", 5, include_background=True), *maps, expected[:4].mean()
    )
    assert_metric_equals(make_metric("dice_per_class", 5), *maps, expected[1:])
    assert_metric_equals(make_metric("dice_per_class", 5, include_background=True), *maps, expected)
    assert_metric_equals(PartialDice(5, [1, 3]), *maps, expected[[1, 3]].mean())
    assert_metric_equals(PartialDice(5, [2, 4]), *maps, expected[2])


def mean_jaccard(output: Tensor, target: Tensor, background: bool) -> Any:
    x, y = output.flatten().numpy(), target.flatten().numpy()
    labels = sorted((set(x) | set(y)) - (set() if background else {0}))
    return sklearn.jaccard_score(y, x, labels=labels, average="macro") if labels else np.nan


@pytest.mark.parametrize("background", [True, False])
def test_mean_and_instance_iou_match_scikit_learn(
    maps: tuple[Tensor, Tensor], background: bool
) -> None:
    outputs, targets = maps[0].argmax(1), maps[1]
    metric = make_metric("mean_iou", 5, include_background=background)
    assert_metric_equals(metric, *maps, mean_jaccard(outputs, targets, background))
    pairs = zip(outputs, targets, strict=True)
    image_scores = [mean_jaccard(output, target, background) for output, target in pairs]
    assert np.isnan(image_scores[8]) == (not background)
    metric = make_metric("instance_iou", 5, include_background=background)
    assert_metric_equals(metric, *maps, np.nanmean(image_scores))


@pytest.mark.filterwarnings("ignore:the (ground truth|prediction) of class")
@pytest.mark.filterwarnings("ignore:monai:FutureWarning")
@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("percentile", [95.0, 100.0])
def test_hausdorff_distance_matches_monai(
    maps: tuple[Tensor, Tensor], percentile: float, background: bool
) -> None:
    outputs, targets = to_one_hot(maps[0].argmax(1)), to_one_hot(maps[1])
    distances = compute_hausdorff_distance(
        outputs, targets, include_background=True, percentile=percentile
    )
    in_both = outputs.flatten(2).any(dim=2) & targets.flatten(2).any(dim=2)
    in_both[:, 0] &= background
    assert 0 < in_both[:, 1:4].sum() < 27
    metric = make_metric("hd95", 5, percentile=percentile, include_background=background)
    assert_metric_equals(metric, *maps, distances[in_both].mean().item())


def single_channel() -> tuple[Tensor, Tensor]:
    """Logits of a sigmoid (8, 1, 9, 9), and labels 0 and 1, of which a third is 1."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 1, 9, 9, generator=generator)
    return logits, (torch.rand(8, 9, 9, generator=generator) < 0.3).long()


@pytest.mark.parametrize("background", [True, False])
def test_segmentation_metrics_of_one_channel_match_scikit_learn(background: bool) -> None:
    logits, targets = single_channel()
    predicted, true = (logits[:, 0] > 0).flatten().numpy(), targets.flatten().numpy()
    iou, dice = sklearn.jaccard_score(true, predicted), sklearn.f1_score(true, predicted)
    images = zip((logits[:, 0] > 0).flatten(1), targets.flatten(1), strict=True)
    instance_iou = np.mean([sklearn.jaccard_score(t.numpy(), o.numpy()) for o, t in images])
    metrics = {
        MeanIoU(1, include_background=background): iou,
        DiceScore(1, include_background=background): dice,
        PartialDice(1, [1]): dice,
        InstanceIoU(1, include_background=background): instance_iou,
    }
    for metric, expected in metrics.items():
        assert_metric_equals(metric, logits, targets, expected)
        assert_metric_equals(metric, logits, targets[:, None].float(), expected)
    two_channels = torch.cat([torch.zeros_like(logits), logits], dim=1)
    one, two = HausdorffDistance95(1, include_background=background), HausdorffDistance95(2)
    assert evaluate(one, logits, targets, [4, 4]) == evaluate(two, two_channels, targets, [4, 4])
    assert evaluate(one, logits, targets[:, None], [8]) == evaluate(two, two_channels, targets, [8])


def test_mean_iou_of_one_channel_excludes_ignored_pixels() -> None:
    logits, targets = single_channel()
    targets[:4] = 255
    predicted, true = (logits[4:, 0] > 0).flatten().numpy(), targets[4:].flatten().numpy()
    expected = sklearn.jaccard_score(true, predicted)
    assert_metric_equals(MeanIoU(1, ignore_index=255), logits, targets, expected)


def test_segmentation_metric_without_any_class_is_nan() -> None:
    outputs, targets = (tensor[8:] for tensor in make_segmentation(2))
    for name in ("dice", "hd95"):
        assert np.isnan(evaluate(make_metric(name, 5), outputs, targets, [1])), name
    for name in ("mean_iou", "instance_iou"):
        metric = make_metric(name, 5, include_background=False)
        assert np.isnan(evaluate(metric, outputs, targets, [1])), name
        assert evaluate(make_metric(name, 5), outputs, targets, [1]) == 1, name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiceScore(0), "num_classes=0 must be at least 1"),
        (lambda: PartialDice(1, [0]), r"classes=\[0\] must be .* from 1 to 1"),
        (lambda: MeanIoU(0), "num_classes=0 must be at least 1"),
        (lambda: DiceScore(3, average="mean"), "average='mean' is not valid; allowed: macro, none"),
        (lambda: PartialDice(3, [1, 3]), r"classes=\[1, 3\] must be .* from 0 to 2"),
        (lambda: PartialDice(3, []), r"classes=\[\] must be at least one"),
        (lambda: HausdorffDistance95(3, percentile=0), "percentile=0 must be above 0"),
        (
            lambda: InstanceIoU(3).update(*make_segmentation(2)),
            r"num_classes=3 .* \(9, 5, 26, 22\)",
        ),
        (lambda: HausdorffDistance95(3).update(*make_segmentation(2)), r"expected: \(N, 3, ...\)"),
    ],
)
def test_segmentation_metric_with_invalid_arguments_raises(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_hausdorff_distance_without_scipy_names_the_extra_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ValueError, match=r"scipy is not installed.*\[segmentation\]"):
        HausdorffDistance95(3)


IGNORED = 255
METRICS_OF_PIXELS = [
    *("mean_iou", "iou_per_class", "dice", "dice_per_class"),
    *("confusion_matrix", "accuracy", "accuracy_per_class", "f1"),
    *("precision", "recall", "specificity"),
]


@pytest.mark.parametrize("name", METRICS_OF_PIXELS)
def test_ignored_pixels_do_not_count(name: str) -> None:
    outputs, targets = make_segmentation(2)
    targets[:, :3] = IGNORED
    kept = targets.flatten() != IGNORED
    pixels = outputs.movedim(1, 0).flatten(1)[:, kept][None]
    expected = make_metric(name, 5)
    expected.update(pixels, targets.flatten()[kept][None])
    metric = make_metric(name, 5, ignore_index=IGNORED)
    assert_metric_equals(metric, outputs, targets, expected.compute().numpy())


def test_ignored_pixels_belong_to_no_class_of_an_image() -> None:
    outputs, targets = make_segmentation(2)
    cropped, targets = (outputs[:, :, 3:], targets[:, 3:]), targets.clone()
    ignored = targets.clone()
    ignored[:, :3] = IGNORED
    expected = make_metric("instance_iou", 5)
    expected.update(cropped[0], cropped[1])
    metric = make_metric("instance_iou", 5, ignore_index=IGNORED)
    assert_metric_equals(metric, outputs, ignored, expected.compute().numpy())
    background = outputs.clone()
    background[:, :, :3] = one_hot(targets[:, :3] * 0, 5).movedim(-1, 1).float()
    targets[:, :3] = 0
    expected = make_metric("hd95", 5)
    expected.update(background, targets)
    metric = make_metric("hd95", 5, ignore_index=IGNORED)
    assert_metric_equals(metric, outputs, ignored, expected.compute().numpy())


def test_iou_per_class_is_that_of_scikit_learn(maps: tuple[Tensor, Tensor]) -> None:
    x, y = maps[0].argmax(1).flatten().numpy(), maps[1].flatten().numpy()
    expected = sklearn.jaccard_score(y, x, labels=range(4), average=None)
    assert_metric_equals(make_metric("iou_per_class", 5), *maps, [*expected, np.nan])
    with pytest.raises(UserError, match="average='micro' is not valid; allowed: macro, none"):
        make_metric("iou_per_class", 5, average="micro")
