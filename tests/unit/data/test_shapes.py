"""Synthetic segmentation data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from app.data.shapes import shapes


def test_shapes_gives_images_and_masks_of_three_classes() -> None:
    images, masks = shapes(200, size=32).tensors
    assert (images.shape, images.dtype) == ((200, 1, 32, 32), torch.float32)
    assert (masks.shape, masks.dtype) == ((200, 32, 32), torch.int64)
    assert 0 <= images.min() < images.max() <= 1
    fractions = masks.flatten().bincount() / masks.numel()
    assert len(fractions) == 3
    assert fractions[1:].min() > 0.05
    assert fractions[0] > 0.5


def test_shapes_depend_only_on_seed() -> None:
    first = shapes(10, size=32, seed=4).tensors
    torch.rand(3)
    for tensor, same in zip(first, shapes(10, size=32, seed=4).tensors, strict=True):
        assert torch.equal(tensor, same)
    assert not torch.equal(first[1], shapes(10, size=32, seed=5).tensors[1])


def test_shapes_without_noise_are_brighter_than_background() -> None:
    images, masks = shapes(50, size=32, noise=0.0).tensors
    images = images[:, 0]
    assert images[masks > 0].min() >= 0.5
    assert images[masks == 0].max() <= 0.3


def test_small_model_learns_shapes() -> None:
    torch.manual_seed(0)
    images, masks = shapes(32, size=32).tensors
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=4, dilation=4),
        nn.ReLU(),
        nn.Conv2d(16, 3, 1),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), masks).backward()
        optimizer.step()
    majority = (masks == 0).double().mean()
    accuracy = (model(images).argmax(1) == masks).double().mean()
    assert accuracy > majority + 0.05


@pytest.mark.parametrize("options", [{"count": 0}, {"size": 8}, {"noise": -1.0}])
def test_shapes_refuses_arguments_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="allowed: at least 1, 16 and 0"):
        shapes(**({"count": 1} | options))
