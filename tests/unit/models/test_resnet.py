"""ResNet-18."""

from __future__ import annotations

from app.models.resnet import ResNet18


def test_resnet18_has_published_number_of_parameters() -> None:
    # ResNet-18 for CIFAR-10 with the 3 x 3 stem: 11.17 million, as in the usual references.
    assert sum(p.numel() for p in ResNet18(10, 3).parameters()) == 11_173_962
