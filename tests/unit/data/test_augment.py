"""Augmentations of batches."""

from __future__ import annotations

import torch

from app.data.augment import RandomFlip, RandomShift


def test_random_shift_draws_offset_per_image() -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 1, 9, 9)
    shifted = RandomShift(2)(image.expand(64, -1, -1, -1))
    padded = torch.nn.functional.pad(image, [2] * 4)[0]
    crops = {(r, c): padded[:, r : r + 9, c : c + 9] for r in range(5) for c in range(5)}
    offsets = [offset for x in shifted for offset, crop in crops.items() if torch.equal(x, crop)]
    assert len(offsets) == 64, "each is one of the 25 crops of the padded image"
    assert len(set(offsets)) > 10


def test_random_flip_draws_per_image() -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 3, 4, 4)
    flipped = RandomFlip(0.5)(image.expand(64, -1, -1, -1))
    count = sum(torch.equal(x, image[0].flip(-1)) for x in flipped)
    assert count + sum(torch.equal(x, image[0]) for x in flipped) == 64
    assert 16 < count < 48
