"""Transforms of images together with their boxes, and boxes in pixels of files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from app.data.augment import ColorJitter, RandomFlip
from app.data.boxed_shapes import boxed_shapes
from app.data.boxes import (
    BoxTransform,
    Targets,
    boxes_in_files,
    check_augmentations,
    make_targets,
)
from app.runtime.errors import UserError

LETTERBOX = (v2.Resize(size=None, max_size=64), v2.CenterCrop([64, 64]))
BOX = [10.0, 10.0, 30.0, 40.0]


def make_sample(boxes: list[list[float]], size: tuple[int, int] = (40, 100)) -> tuple[Any, ...]:
    """Return an image that is white inside of the boxes, and the boxes, padded to five."""
    image = torch.zeros(3, *size, dtype=torch.uint8)
    for x1, y1, x2, y2 in boxes:
        image[:, int(y1) : int(y2), int(x1) : int(x2)] = 255
    labels = torch.arange(len(boxes))
    crowd = labels == 1
    return image, make_targets(torch.tensor(boxes).reshape(-1, 4), labels, crowd, 5, size)


def apply(
    sample: tuple[Any, ...], *transforms: Callable[..., Any], is_training: bool = False
) -> tuple[Tensor, Targets]:
    image, targets = BoxTransform(transforms, 0, 1, is_training)(sample)
    return image, targets


def test_letterbox_keeps_ratio_and_boxes_come_back() -> None:
    image, targets = apply(make_sample([BOX]), *LETTERBOX)
    assert image.shape == (3, 64, 64)
    assert type(image) is Tensor
    assert targets["frame"].tolist() == [0, 20, 64, 45]  # 100 x 40 pixels become 64 x 25
    assert targets["boxes"].shape == (5, 4)
    x1, y1, x2, y2 = targets["boxes"][0].round().int().tolist()
    assert image[0, y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].float().mean() > 250
    assert image[0].float().sum() / 255 == pytest.approx((x2 - x1) * (y2 - y1), rel=0.05)
    parts = (targets[name][None] for name in ("boxes", "size", "frame"))
    torch.testing.assert_close(boxes_in_files(*parts)[0, 0], torch.tensor(BOX))


def test_boxes_in_files_are_cut_off_at_the_file() -> None:
    boxes = torch.tensor([[[-3.0, 5.0, 70.0, 64.0]]])
    size, frame = torch.tensor([[40, 100]]), torch.tensor([[0.0, 20.0, 64.0, 45.0]])
    assert boxes_in_files(boxes, size, frame).tolist() == [[[0, 0, 100, 40]]]


def test_flip_moves_boxes_with_pixels() -> None:
    image, targets = apply(make_sample([BOX]), v2.RandomHorizontalFlip(1.0))
    assert targets["boxes"][0].tolist() == [70, 10, 90, 40]
    assert image[0, 10:40, 70:90].min() == 255


def test_boxes_that_are_cropped_away_are_removed_with_their_labels() -> None:
    sample = make_sample([[80, 0, 90, 10], BOX, [0, 0, 8, 8]])
    _, targets = apply(sample, v2.CenterCrop([20, 60]), is_training=True)  # x from 20, y from 10
    assert targets["labels"].tolist() == [1, -1, -1, -1, -1]
    assert targets["boxes"][0].tolist() == [0, 0, 10, 20]
    assert targets["crowd"].tolist() == [True, False, False, False, False]


def test_recipes_of_torchvision_train_with_boxes() -> None:
    sample = make_sample([BOX, [50, 0, 90, 30]])
    recipe = [v2.RandomZoomOut(), v2.RandomIoUCrop(), v2.SanitizeBoundingBoxes(), *LETTERBOX]
    for seed in range(10):
        torch.manual_seed(seed)
        image, targets = apply(sample, *recipe, is_training=True)
        assert image.shape == (3, 64, 64)
        is_box = targets["labels"] >= 0
        assert {*targets["labels"][is_box].tolist()} <= {0, 1}
        boxes = targets["boxes"][is_box]
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert ((boxes >= 0) & (boxes <= 64)).all()


def test_image_without_boxes_is_transformed() -> None:
    _, targets = apply(make_sample([]), v2.RandomHorizontalFlip(1.0), *LETTERBOX)
    assert targets["labels"].tolist() == [-1] * 5


def test_color_augmentation_gets_image_alone() -> None:
    sample = make_sample([BOX])
    image, targets = apply(sample, ColorJitter(brightness=[0.2, 0.8]))
    assert not torch.equal(image, sample[0])
    assert torch.equal(targets["boxes"], sample[1]["boxes"])


@pytest.mark.parametrize("transform", [RandomFlip(), lambda image: image, lambda image, _: image])
def test_transform_that_leaves_out_boxes_is_refused(transform: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="cannot transform images together with boxes"):
        apply(make_sample([BOX]), transform)


def test_augmentation_of_batches_that_moves_pixels_is_refused() -> None:
    check_augmentations({"color": ColorJitter(brightness=0.5)})
    with pytest.raises(UserError, match=r"data.augment.flip \(RandomFlip\) may move pixels, but"):
        check_augmentations({"flip": RandomFlip()})


def test_boxed_shapes_fit_what_is_drawn() -> None:
    dataset, again = boxed_shapes(60, 48, noise=0.0), boxed_shapes(60, 48, noise=0.0)
    assert dataset.fingerprint() == again.fingerprint()
    kinds: set[int] = set()
    for index in range(len(dataset)):
        image, targets = dataset[index]
        pixels, background = image[0].int(), image[0].min()
        is_box = targets["labels"] >= 0
        if is_box.sum() != 1 or (pixels > background).sum() == 0:
            continue  # several may hide each other
        rows, columns = (pixels > background).nonzero(as_tuple=True)
        edges = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        if targets["boxes"][0].tolist() == [float(edge) for edge in edges]:
            kinds.add(int(targets["labels"][0]))
            x1, y1 = edges[:2]
            is_filled = bool(pixels[y1, x1] > background)  # the corner
            assert is_filled == (targets["labels"][0] == 1)
    assert kinds == {0, 1}


@pytest.mark.parametrize("options", [{"count": 0}, {"size": 8}, {"noise": -1.0}])
def test_boxed_shapes_check_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="allowed: at least 1, 16 and 0"):
        boxed_shapes(**{"count": 1, **options})
