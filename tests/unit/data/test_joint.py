"""Images and masks are transformed together: same parameters, nearest labels, `outside` beyond."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tv

from app.data import augment
from app.data.batch import BatchLoader
from app.data.joint import fill_masks, transform_both
from app.data.transform import ResizeCenterCrop, for_batches
from app.runtime.errors import UserError
from tests.support.data_files import write_data
from tests.unit.data.test_stage_transforms import make_stage_loaders

IGNORED = 255
GEOMETRIC = [
    augment.RandomHorizontalFlip(),
    augment.RandomVerticalFlip(),
    augment.RandomFlip(),
    augment.RandomShift(5),
    augment.RandomAffine(30, (0.2, 0.2), (0.7, 1.3), 10),
]
COLOR = [
    augment.ColorJitter(0.4, 0.4, 0.4, 0.1),
    augment.RandomGrayscale(0.5),
    augment.GaussianBlur(3),
    augment.RandomErasing(1.0, value="random"),
    v2.ColorJitter(0.5),
]


def make_pair(count: int = 16, size: int = 24) -> tuple[Tensor, Tensor]:
    """Return images (N, 1, H, W) whose pixels are those of their masks divided by 255."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(1, 7, (count, size, size), generator=generator, dtype=torch.uint8)
    return masks[:, None] / 255, masks


@pytest.mark.parametrize("transform", GEOMETRIC, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_geometric_augmentations_move_masks_with_their_images(
    transform: augment.Augmentation, dtype: torch.dtype
) -> None:
    images, masks = make_pair()
    torch.manual_seed(1)
    moved, labels = transform_both(transform, images, masks.to(dtype), IGNORED)
    assert labels is not None
    assert labels.dtype == dtype
    assert not torch.equal(labels, masks.to(dtype))
    pixels = (moved[:, 0] * 255).round().to(dtype)
    assert torch.equal(labels, torch.where(pixels == 0, IGNORED, pixels).to(dtype))
    torch.manual_seed(1)
    assert torch.equal(moved, transform(images))
    single = transform_both(transform, images[0], masks[0], IGNORED)
    assert [part.shape for part in single if part is not None] == [(1, 24, 24), (24, 24)]


@pytest.mark.parametrize("size", [(24, 24), (7, 40)])
def test_crops_of_masks_equal_those_of_torchvision(size: tuple[int, int]) -> None:
    images, masks = make_pair(200)
    crop = augment.RandomResizedCrop(size)
    torch.manual_seed(2)
    _, labels = transform_both(crop, images, masks, IGNORED)
    assert labels is not None
    torch.manual_seed(2)
    params = crop.make_params(images)
    boxes = torch.stack([params[name] for name in ("top", "left", "height", "width")], 1).int()
    for mask, box, label in zip(masks, boxes.tolist(), labels, strict=True):
        nearest = InterpolationMode.NEAREST
        assert torch.equal(tv.resized_crop(mask[None], *box, [*size], nearest)[0], label)


@pytest.mark.parametrize("transform", COLOR, ids=lambda t: type(t).__name__)
def test_colors_leave_masks_alone(transform: nn.Module) -> None:
    images, masks = make_pair()
    images = images.expand(-1, 3, -1, -1)
    changed, labels = transform_both(augment.per_image(transform), images, masks, IGNORED)
    assert labels is masks or torch.equal(labels, masks)  # type: ignore[arg-type]
    assert not torch.equal(changed, images)


@pytest.mark.parametrize(
    "transform",
    [augment.TrivialAugmentWide(), augment.RandAugment(), v2.RandAugment(), v2.AutoAugment()],
    ids=lambda t: f"{type(t).__module__}.{type(t).__name__}",
)
def test_policies_are_refused_with_masks(transform: nn.Module) -> None:
    images, masks = make_pair()
    images = (images.expand(-1, 3, -1, -1) * 255).byte()
    with pytest.raises(UserError, match=f"{type(transform).__name__} .*; allowed "):
        transform_both(augment.per_image(transform), images, masks, IGNORED)


def test_functions_must_return_image_and_mask() -> None:
    images, masks = make_pair()
    flipped = transform_both(lambda i, m: (i.flip(-1), m.flip(-1)), images, masks, 0)
    assert torch.equal(flipped[1], masks.flip(-1))  # type: ignore[arg-type]
    assert type(flipped[0]) is Tensor
    for function in (lambda image: image, lambda image, mask: (image[..., :3], mask)):
        with pytest.raises(UserError, match="cannot transform images together with masks"):
            transform_both(function, images, masks, 0)


def test_transforms_of_torchvision_draw_for_each_sample_and_fill_masks_with_a_label() -> None:
    images, masks = make_pair()
    transform = v2.Compose([v2.RandomRotation((30, 60)), v2.RandomHorizontalFlip()])
    fill_masks(transform, IGNORED)
    moved, labels = transform_both(for_batches(transform), images, masks, IGNORED)
    assert labels is not None
    pixels = (moved[:, 0] * 255).round().to(torch.uint8)
    assert torch.equal(labels, torch.where(pixels == 0, IGNORED, pixels))
    assert len({tuple((mask == IGNORED).flatten().tolist()) for mask in labels}) > 5


def test_resizing_takes_batches_with_the_nearest_label() -> None:
    images, masks = make_pair(3)
    for transform in (v2.Resize([12, 12]), ResizeCenterCrop(12, 0.5)):
        assert for_batches(transform) is transform
        _, labels = transform_both(transform, images, masks, 0)
        expected = transform(tv_tensors.Mask(masks))
        assert torch.equal(labels, expected)  # type: ignore[arg-type]


def first_batch(loader: BatchLoader, epoch: int = 1) -> tuple[Tensor, Tensor]:
    images, masks = next(iter(loader.epoch(epoch)))
    return images, masks


def test_loaders_of_files_give_the_same_with_and_without_workers(tmp_cwd: Path) -> None:
    files = write_data("masks", tmp_cwd)
    options = ["data=masks", *files, "data.batch_size=4", "~data.augment.flip"]
    alone, workers = (
        make_stage_loaders(*options, f"data.loader.num_workers={count}") for count in (0, 2)
    )
    for stage in ("train", "valid"):
        (images, masks), (other_images, other_masks) = map(
            first_batch, (alone[stage], workers[stage])
        )
        assert torch.equal(images, other_images)
        assert torch.equal(masks, other_masks)
        assert (masks.dtype, masks.shape[1:], images.shape[1:]) == (
            torch.int64,
            (16, 16),
            (3, 16, 16),
        )
    again = first_batch(alone["train"], 2)
    assert not torch.equal(again[1], first_batch(alone["train"])[1])


def test_masks_in_memory_are_augmented_with_their_images() -> None:
    flip = "+data.augment.flip={_target_: app.data.augment.RandomHorizontalFlip, p: 1.0}"
    options = ("data=shapes", *write_data("shapes", Path()), "model=unet", "data.batch_size=8")
    groups = ("loss=dice_ce", "metric=segmentation", "goal.metric=mean_iou", "data.image_size=32")
    plain, flipped = (
        first_batch(make_stage_loaders(*options, *groups, *more)["train"]) for more in ((), (flip,))
    )
    for before, after in zip(plain, flipped, strict=True):
        assert torch.equal(before.flip(-1), after)
