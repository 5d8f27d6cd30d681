"""Augmentations of images, on batches and on the device, drawn for each image.

Names and arguments are those of `torchvision.transforms.v2`; docs/augmentation.md lists what
differs. `per_image` adapts transforms of torchvision, which draw once for a whole batch.
"""

from app.data.augment.base import Augmentation
from app.data.augment.color import ColorJitter, GaussianBlur, RandomGrayscale
from app.data.augment.geometry import (
    RandomAffine,
    RandomErasing,
    RandomFlip,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomShift,
    RandomVerticalFlip,
)
from app.data.augment.per_image import PerImage, PerSample, draws_once_per_batch, per_image
from app.data.augment.policies import RandAugment, TrivialAugmentWide

__all__ = [
    "Augmentation",
    "ColorJitter",
    "GaussianBlur",
    "PerImage",
    "PerSample",
    "RandAugment",
    "RandomAffine",
    "RandomErasing",
    "RandomFlip",
    "RandomGrayscale",
    "RandomHorizontalFlip",
    "RandomResizedCrop",
    "RandomShift",
    "RandomVerticalFlip",
    "TrivialAugmentWide",
    "draws_once_per_batch",
    "per_image",
]
