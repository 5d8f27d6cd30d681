"""MixUp and CutMix, and when each is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchvision.transforms import v2

from app.data.mix import MixUpCutMix

IMAGES, LABELS = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])
ONE_HOT = torch.eye(4)[LABELS]


def kind_of(mix: MixUpCutMix) -> str:
    """Mix a batch, and return what has been done to it."""
    images, targets = mix(IMAGES, LABELS)
    assert targets.shape == (6, 4) and targets.dtype == torch.float32
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    if torch.equal(images, IMAGES):
        return "cutmix" if not torch.equal(targets, ONE_HOT) else "none"
    previous = IMAGES.roll(1, 0)
    return "cutmix" if ((images == IMAGES) | (images == previous)).all() else "mixup"


@pytest.mark.parametrize(
    ("name", "theirs"), [("mixup_alpha", v2.MixUp), ("cutmix_alpha", v2.CutMix)]
)
def test_mix_with_one_alpha_equals_torchvision(name: str, theirs: Any) -> None:
    mix = MixUpCutMix(4, **{name: 0.7})
    for seed in range(5):
        torch.manual_seed(seed)
        images, targets = mix(IMAGES, LABELS)
        torch.manual_seed(seed)
        torch.rand(())  # whether to mix
        expected_images, expected_targets = theirs(alpha=0.7, num_classes=4)(IMAGES, LABELS)
        assert torch.equal(images, expected_images) and torch.equal(targets, expected_targets)


def test_mix_probabilities_are_the_shares_of_batches() -> None:
    torch.manual_seed(0)
    mix = MixUpCutMix(4, mixup_alpha=1.0, cutmix_alpha=1.0, p=0.8, switch_p=0.25)
    kinds = [kind_of(mix) for _ in range(2000)]
    shares = {kind: kinds.count(kind) / 2000 for kind in ("none", "mixup", "cutmix")}
    # A CutMix rectangle may be empty, which leaves the batch as it is.
    assert abs(shares["none"] - 0.2) < 0.05
    assert abs(shares["mixup"] - 0.6) < 0.04
    assert abs(shares["cutmix"] - 0.2) < 0.05


def test_mix_ends_before_until_epoch() -> None:
    mix = MixUpCutMix(4, mixup_alpha=1.0, until_epoch=3)
    kinds = []
    for epoch in (1, 2, 3, 4):
        mix.set_epoch(epoch)
        kinds.append(kind_of(mix))
    assert kinds == ["mixup", "mixup", "none", "none"]


def test_mix_keeps_probabilities_as_labels() -> None:
    mix = MixUpCutMix(4, mixup_alpha=1.0, p=0.0)
    assert mix(IMAGES, ONE_HOT)[1] is ONE_HOT


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({}, "mixup_alpha=None, cutmix_alpha=None are not valid together; allowed: a positive"),
        ({"mixup_alpha": 0}, "mixup_alpha=0 is not valid; allowed: a positive number, or null"),
        ({"cutmix_alpha": -1.0}, "cutmix_alpha=-1.0 is not valid; allowed: a positive number"),
        ({"mixup_alpha": 1, "p": 2}, "p=2 is not valid; allowed: a number from 0 to 1"),
        ({"mixup_alpha": 1, "switch_p": -1}, "switch_p=-1 is not valid; allowed: a number from"),
        ({"mixup_alpha": 1, "until_epoch": 0}, "until_epoch=0 is not valid; allowed: an integer"),
        ({"mixup_alpha": 1, "num_classes": None}, "num_classes=None is not valid; allowed: an"),
    ],
)
def test_mix_bad_argument_names_value_and_allowed(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        MixUpCutMix(**{"num_classes": 4, **arguments})
