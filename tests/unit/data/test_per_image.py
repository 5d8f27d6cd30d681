"""The adapter for transforms of torchvision that draw once for a whole batch."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import transforms as v1
from torchvision.transforms import v2

from app.config.instantiate import Instantiator
from app.data.augment import (
    PerImage,
    RandomHorizontalFlip,
    TrivialAugmentWide,
    draws_once_per_batch,
    per_image,
)
from app.data.datamodule import make_datasets, make_loaders
from app.runtime.errors import UserError
from tests.support.runs import job_for

# Arguments of those that cannot be built without any.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("Resize", "CenterCrop", "RandomCrop", "RandomResizedCrop"), (8,)),
    **{"Normalize": ([0.5], [0.5]), "Pad": (1,), "GaussianBlur": (3,), "RandomRotation": (20,)},
    **{"RandomAffine": (20,), "RandomPosterize": (4,), "RandomSolarize": (0.5,), "JPEG": (50,)},
    **{"RandomAdjustSharpness": (2,), "RandomShortestSide": (8,), "RandomResize": (4, 9)},
    **{
        "ConvertImageDtype": (torch.float32,),
        "ScaleJitter": ((8, 8),),
        "Lambda": (abs,),
        "ToDtype": (torch.float32,),
    },
    **{"LinearTransformation": (torch.eye(3), torch.zeros(3)), "FiveCrop": (4,), "TenCrop": (4,)},
    **{name: ([v2.RandomInvert()],) for name in ("RandomApply", "RandomChoice", "RandomOrder")},
    **{"Compose": ([v2.Pad(1)],)},
}
RANDOM = {
    *("AugMix", "AutoAugment", "ColorJitter", "ElasticTransform", "GaussianBlur", "JPEG"),
    *("RandAugment", "RandomAdjustSharpness", "RandomAffine", "RandomApply", "RandomAutocontrast"),
    *("RandomChannelPermutation", "RandomChoice", "RandomCrop", "RandomEqualize", "RandomErasing"),
    *("RandomGrayscale", "RandomHorizontalFlip", "RandomInvert", "RandomIoUCrop", "RandomOrder"),
    *("RandomPerspective", "RandomPhotometricDistort", "RandomPosterize", "RandomResize"),
    *("RandomResizedCrop", "RandomRotation", "RandomShortestSide", "RandomSolarize"),
    *("RandomVerticalFlip", "RandomZoomOut", "ScaleJitter", "TrivialAugmentWide"),
}
DETERMINISTIC = {
    *("CenterCrop", "Compose", "ConvertImageDtype", "GaussianNoise", "Grayscale", "Identity"),
    *("Lambda", "LinearTransformation", "Normalize", "Pad", "RGB", "Resize", "ToDtype"),
}


@pytest.mark.parametrize("version", [v1, v2], ids=["v1", "v2"])
@pytest.mark.filterwarnings("ignore")
def test_draws_once_per_batch_recognizes_all_transforms(version: Any) -> None:
    names = [name for name, value in vars(version).items() if inspect.isclass(value)]
    for name in names:
        if name in RANDOM | DETERMINISTIC:
            transform = getattr(version, name)(*ARGUMENTS.get(name, ()))
            expected = name in RANDOM or (version is v1 and name == "Lambda")
            assert draws_once_per_batch(transform) == expected, name
    known = RANDOM & set(names)
    assert len(known) > 20, "most of them are in both versions"


def test_draws_once_per_batch_looks_into_compositions() -> None:
    assert draws_once_per_batch(v2.Compose([v2.Pad(1), v2.RandomInvert()]))
    assert draws_once_per_batch(nn.Sequential(v2.Pad(1), v2.Compose([v2.ColorJitter(0.5)])))
    assert not draws_once_per_batch(v2.Compose([v2.Pad(1), RandomHorizontalFlip()]))
    assert not draws_once_per_batch(nn.Dropout())
    assert not draws_once_per_batch(torch.nn.functional.relu)


def test_draws_once_per_batch_knows_transforms_of_users() -> None:
    class Own(v2.Transform):
        def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
            return {"factors": torch.rand(len(flat_inputs))}

    class OwnCrop(v1.RandomCrop):
        pass

    assert draws_once_per_batch(Own())
    assert draws_once_per_batch(OwnCrop(4))


@pytest.mark.parametrize("transform", [v2.ColorJitter(0.9), v1.ColorJitter(0.9)])
def test_per_image_draws_for_each_image(transform: Any) -> None:
    images = torch.rand(3, 6, 6).expand(16, -1, -1, -1)
    assert len({image.numpy().tobytes() for image in transform(images)}) == 1
    wrapped = per_image(transform)
    assert isinstance(wrapped, PerImage)
    assert len({image.numpy().tobytes() for image in wrapped(images)}) == 16


def test_per_image_of_one_image_equals_the_transform() -> None:
    image, transform = torch.rand(3, 6, 6), v2.RandomResizedCrop(4)
    results = []
    for apply, x in (
        (transform, image),
        (PerImage(transform), image),
        (PerImage(transform), image[None]),
    ):
        torch.manual_seed(0)
        results.append(apply(x).reshape(3, 4, 4))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert PerImage(transform)(torch.rand(0, 3, 6, 6)).shape[0] == 0


def test_per_image_leaves_batched_transforms_alone() -> None:
    for transform in (TrivialAugmentWide(), v2.Pad(1), nn.Dropout(), torch.abs):
        assert per_image(transform) is transform


def test_per_image_results_of_different_sizes_are_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(UserError, match=r"RandomResize.* images of different sizes"):
        PerImage(v2.RandomResize(4, 40))(torch.rand(8, 3, 6, 6))


def test_per_image_mixup_is_refused() -> None:
    with pytest.raises(UserError, match=r"MixUp needs labels .* use task=mixup_cutmix"):
        per_image(v2.MixUp(num_classes=10))


def test_data_augment_with_random_torchvision_transform_draws_for_each_image() -> None:
    invert = "+data.augment.invert={_target_: torchvision.transforms.v2.RandomInvert}"
    job = job_for("model=mlp", "data.normalize=null", "data.memory=host", invert)
    datasets = make_datasets(job.config, Instantiator())
    loaders = make_loaders(
        job.config, Instantiator(), datasets, torch.device("cpu"), torch.contiguous_format
    )
    images, _ = loaders["train"].first(64)
    share = (images.mean((1, 2, 3)) > 0.5).float().mean()  # digits are bright on black
    assert 0.2 < share < 0.8
