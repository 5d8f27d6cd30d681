"""Transforms of batches on the device, and measured statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from app.data.augment import RandomErasing, RandomHorizontalFlip, RandomShift
from app.data.transform import BatchTransform, ResizeCenterCrop, channel_statistics
from app.runtime.errors import UserError


def make_transform(**options: Any) -> BatchTransform:
    defaults: dict[str, Any] = {
        "mean": None,
        "std": None,
        "size": None,
        "channels": None,
        "memory_format": torch.contiguous_format,
    }
    return BatchTransform(**(defaults | options))


def test_transform_scales_bytes_and_normalizes_per_channel() -> None:
    x = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    result = make_transform(mean=mean[:, None, None], std=std[:, None, None])(x)
    scaled = v2.functional.to_dtype(x, torch.float32, scale=True)
    expected = v2.functional.normalize(scaled, mean.tolist(), std.tolist())
    torch.testing.assert_close(result, expected)  # one rounding more or less


@pytest.mark.parametrize("count", [1, 3])
def test_transform_gives_the_same_pixels_in_both_memory_formats(count: int) -> None:
    x = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8)
    mean, std = torch.rand(2, count, 1, 1) + 0.1
    results = [
        make_transform(mean=mean, std=std, memory_format=layout)(images)
        for layout in (torch.contiguous_format, torch.channels_last)
        for images in (x, x.contiguous(memory_format=torch.channels_last))
    ]
    expected = x.to(torch.float32).div(255).sub(mean).div(std)
    assert all(torch.equal(result, expected) for result in results)
    assert results[2].is_contiguous(memory_format=torch.channels_last)


def test_transform_does_not_modify_stored_data() -> None:
    x = torch.rand(2, 1, 4, 4)
    before = x.clone()
    mean, std = torch.tensor([0.5])[:, None, None], torch.tensor([2.0])[:, None, None]
    make_transform(mean=mean, std=std)(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("size", [None, 6])
def test_augmentations_of_bytes_give_the_result_of_those_of_floats(size: int | None) -> None:
    x = torch.randint(0, 256, (8, 3, 5, 5), dtype=torch.uint8)
    steps = [RandomShift(2), RandomHorizontalFlip(), RandomErasing(1.0), RandomHorizontalFlip()]
    results = []
    for images in (x, x.float() / 255):
        torch.manual_seed(0)
        results.append(make_transform(size=size, augment=steps)(images))
    assert torch.equal(*results)


def test_transform_normalizes_gray_images_with_statistics_of_color_images() -> None:
    x = torch.randint(0, 256, (2, 1, 4, 4), dtype=torch.uint8)
    mean, std = torch.rand(3)[:, None, None], torch.rand(3)[:, None, None] + 1
    result = make_transform(mean=mean, std=std, channels=3)(x)
    assert torch.equal(result, make_transform(mean=mean, std=std)(x.expand(-1, 3, -1, -1)))
    with pytest.raises(UserError, match=r"data\.normalize has 3 values, but the images have 1"):
        make_transform(mean=mean, std=std, channels=1)(x)


def test_transform_resizes_and_converts_channels() -> None:
    x = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    assert make_transform(size=64, channels=3)(x).shape == (2, 3, 64, 64)
    assert make_transform(channels=1)(x.expand(-1, 3, -1, -1)).shape == (2, 1, 28, 28)
    with pytest.raises(UserError, match=r"data\.channels=4, but the images have 1"):
        make_transform(channels=4)(x)


def test_transform_sets_memory_format() -> None:
    x = torch.rand(2, 3, 8, 8)
    assert make_transform(memory_format=torch.channels_last)(x).is_contiguous(
        memory_format=torch.channels_last
    )


def test_channel_statistics_normalize_to_mean_0_and_std_1() -> None:
    x = torch.randint(0, 256, (50, 2, 6, 6), dtype=torch.uint8)
    mean, std = channel_statistics(TensorDataset(x, torch.zeros(50)))
    y = (x.double() / 255 - torch.tensor(mean).view(2, 1, 1)) / torch.tensor(std).view(2, 1, 1)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(2).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(y.std((0, 2, 3), correction=0), torch.ones(2).double())
    some = torch.arange(0, 50, 3)
    of_some = channel_statistics(TensorDataset(x), rows=some)
    torch.testing.assert_close(of_some, channel_statistics(TensorDataset(x[some].double() / 255)))


def test_resize_center_crop_is_the_recipe_of_torchvision() -> None:
    recipe = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])
    for height, width in ((300, 400), (500, 300)):
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        assert torch.equal(ResizeCenterCrop(224, 0.875)(image), recipe(image))
        assert torch.equal(ResizeCenterCrop(224, 0.875)(image[None])[0], recipe(image))
    whole = ResizeCenterCrop(32)(torch.zeros(3, 64, 96))
    assert whole.shape == (3, 32, 32)
    with pytest.raises(ValueError, match=r"ratio=1\.5 must be above 0"):
        ResizeCenterCrop(32, 1.5)
