"""Augmentations of batches against torchvision's transforms of single images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision.transforms import v2

from app.data.augment import (
    Augmentation,
    ColorJitter,
    GaussianBlur,
    RandAugment,
    RandomAffine,
    RandomErasing,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomShift,
    RandomVerticalFlip,
    TrivialAugmentWide,
)
from app.data.augment.geometry import resized_crop
from app.data.augment.policies import OPERATIONS

COUNT = 16
EIGHT_BIT = ("Posterize", "Solarize", "AutoContrast", "Equalize")
COLORS = (0.4, 0.4, 0.4, 0.3)
AFFINE: dict[str, Any] = {
    "degrees": 40,
    "translate": (0.2, 0.1),
    "scale": (0.5, 1.5),
    "shear": (-20, 20, -10, 10),
}


def smooth_images(height: int = 34, width: int = 46) -> Tensor:
    """Return uint8 images whose neighboring pixels are similar, with all their colors."""
    torch.manual_seed(0)
    coarse = torch.rand(COUNT, 3, 6, 8)
    fine = v2.functional.resize(coarse, [height, width], antialias=False)
    return (fine * 255).round().to(torch.uint8)


def stack(params: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Batch the parameters that torchvision draws for single images."""
    return {name: torch.tensor([p[name] for p in params]).float() for name in params[0]}


def assert_same(ours: Tensor, theirs: Tensor, steps: float, share: float = 0.0) -> None:
    """Compare values in [0, 1]; a share of them may differ by more than `steps` of 255."""
    difference = (ours.float() - theirs.float()).abs() * 255
    assert (difference > steps).float().mean() <= share, difference.max()


def test_resized_crop_of_same_boxes_equals_torchvision() -> None:
    images = smooth_images()
    for size, antialias in (((12, 9), True), ((12, 9), False), ((50, 64), True)):
        theirs = v2.RandomResizedCrop(size, antialias=antialias)
        params = [theirs.make_params([image]) for image in images]
        expected = [theirs.transform(i, p) for i, p in zip(images, params, strict=True)]
        ours = RandomResizedCrop(size, antialias=antialias)
        assert torch.equal(ours.transform(images, stack(params)), torch.stack(expected))
        expected = [theirs.transform(i, p) for i, p in zip(images / 255, params, strict=True)]
        batched = resized_crop(images / 255, **stack(params), size=size, antialias=antialias)
        torch.testing.assert_close(batched, torch.stack(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(34, 46), (5, 40), (40, 5), (1, 1)])
def test_resized_crop_draws_boxes_as_torchvision_does(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    image = torch.zeros(3, *shape)
    theirs = v2.RandomResizedCrop(8)
    drawn = [theirs.make_params([image]) for _ in range(2000)]
    crop, images = RandomResizedCrop(8), image.expand(2000, -1, -1, -1)
    for ours in (crop.make_params(images), crop.draw_boxes(images)):  # on the CPU, and elsewhere
        assert_same_distribution(ours, stack(drawn))
        assert (ours["top"] >= 0).all() and (ours["top"] + ours["height"] <= shape[0]).all()
        assert (ours["left"] >= 0).all() and (ours["left"] + ours["width"] <= shape[1]).all()


def assert_same_distribution(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, values in theirs.items():
        columns = (t.reshape(len(values), -1).T for t in (ours[name], values))
        for mine, yours in zip(*columns, strict=True):
            assert ks_2samp(mine.numpy(), yours.numpy()).pvalue > 1e-3, name


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_affine_of_same_parameters_equals_torchvision(interpolation: str) -> None:
    images = smooth_images()
    theirs = v2.RandomAffine(**AFFINE)
    params = [theirs.make_params([image]) for image in images]
    ours = RandomAffine(**AFFINE, interpolation=interpolation)
    # Without `fill`, since torchvision weights bilinear edge pixels twice with it.
    mode = v2.InterpolationMode(interpolation)
    expected = [
        v2.functional.affine(i / 255, **p, interpolation=mode)
        for i, p in zip(images, params, strict=True)
    ]
    result = ours.transform(images / 255, stack(params))
    share = 1e-3 if interpolation == "nearest" else 0  # between two pixels, rounding decides
    assert_same(result, torch.stack(expected), 0.01, share)


def test_affine_fill_equals_torchvision() -> None:
    images = smooth_images() / 255
    theirs = v2.RandomAffine(**AFFINE, fill=0.5)
    params = [theirs.make_params([image]) for image in images]
    expected = [theirs.transform(i, p) for i, p in zip(images, params, strict=True)]
    ours = RandomAffine(**AFFINE, fill=0.5).transform(images, stack(params))
    assert_same(ours, torch.stack(expected), 0.01, 1e-3)


def test_affine_draws_as_torchvision_does() -> None:
    torch.manual_seed(0)
    image = torch.zeros(3, 34, 46)
    theirs = v2.RandomAffine(**AFFINE)
    drawn = stack([theirs.make_params([image]) for _ in range(2000)])
    ours = RandomAffine(**AFFINE).make_params(image.expand(2000, -1, -1, -1))
    assert_same_distribution(ours, drawn)
    horizontal = RandomAffine(0, shear=(5, 10)).make_params(image[None])["shear"]
    assert 5 <= horizontal[0, 0] <= 10 and horizontal[0, 1] == 0


def test_erasing_of_same_boxes_equals_torchvision() -> None:
    images = smooth_images() / 255
    theirs = v2.RandomErasing(value=0.3)
    params = [theirs.make_params([image]) for image in images]
    expected = [theirs.transform(i, p) for i, p in zip(images, params, strict=True)]
    boxes = stack([{name: p[name] for name in "ijhw"} for p in params])
    renamed = {"top": boxes["i"], "left": boxes["j"], "height": boxes["h"], "width": boxes["w"]}
    assert torch.equal(RandomErasing(value=0.3).transform(images, renamed), torch.stack(expected))


@pytest.mark.parametrize("shape", [(34, 46), (3, 40)])
def test_erasing_draws_boxes_as_torchvision_does(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    image = torch.zeros(3, *shape)
    theirs = v2.RandomErasing(ratio=(0.3, 0.8))
    drawn = [theirs.make_params([image]) for _ in range(2000)]
    erased = stack([{name: p[name] for name in "ijhw"} for p in drawn if p["v"] is not None])
    ours = RandomErasing(1.0, ratio=(0.3, 0.8)).make_params(image.expand(2000, -1, -1, -1))
    is_erased = ours["mask"]
    assert abs(int(is_erased.sum()) - len(erased["h"])) < 60
    mine = [
        ours[name][is_erased][: len(erased["h"])] for name in ("top", "left", "height", "width")
    ]
    for values, name in zip(mine, "ijhw", strict=True):
        assert ks_2samp(values.numpy(), erased[name].numpy()).pvalue > 1e-3


def test_erasing_random_value_is_uniform_noise() -> None:
    images = torch.full((8, 3, 16, 16), 2.0)
    erased = RandomErasing(1.0, scale=(0.5, 0.5), ratio=(1, 1), value="random")(images)
    noise = erased[erased != 2]
    assert noise.min() < 0.05 and noise.max() <= 1 and abs(noise.mean() - 0.5) < 0.05
    assert 0.4 < (erased != 2).float().mean() < 0.6


@pytest.mark.parametrize("probability", [0.3, 0.0, 1.0])
def test_probability_is_the_share_of_changed_images(probability: float) -> None:
    torch.manual_seed(0)
    images = torch.rand(1, 3, 8, 8).expand(1000, -1, -1, -1)
    p = probability
    for augment in (
        RandomHorizontalFlip(p),
        RandomVerticalFlip(p),
        RandomGrayscale(p),
        RandomErasing(p),
        GaussianBlur(3, (1, 2), p),
        ColorJitter(brightness=(0.2, 0.3), p=p),
    ):
        share = (augment(images) != images).flatten(1).any(1).float().mean()
        assert abs(share - p) < (0.05 if 0 < p < 1 else 1e-6), augment


def test_flips_equal_torchvision() -> None:
    images = smooth_images()
    assert torch.equal(RandomHorizontalFlip(1)(images), v2.RandomHorizontalFlip(1)(images))
    assert torch.equal(RandomVerticalFlip(1)(images), v2.RandomVerticalFlip(1)(images))


def test_random_shift_draws_offset_per_image() -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 1, 9, 9)
    shifted = RandomShift(2)(image.expand(64, -1, -1, -1))
    padded = torch.nn.functional.pad(image, [2] * 4)[0]
    crops = {(r, c): padded[:, r : r + 9, c : c + 9] for r in range(5) for c in range(5)}
    offsets = [offset for x in shifted for offset, crop in crops.items() if torch.equal(x, crop)]
    assert len(offsets) == 64, "each is one of the 25 crops of the padded image"
    assert len(set(offsets)) > 10


def test_color_jitter_of_same_factors_equals_torchvision() -> None:
    images = smooth_images()
    theirs = v2.ColorJitter(*COLORS)
    params = [theirs.make_params([i]) | {"fn_idx": torch.arange(4)} for i in images]
    expected = [theirs.transform(i, p) for i, p in zip(images / 255, params, strict=True)]
    factors = stack([{name: p[name] for name in p if name != "fn_idx"} for p in params])
    ours = ColorJitter(*COLORS).transform(images / 255, factors)
    assert_same(ours, torch.stack(expected), 0.01)


def test_color_jitter_draws_factors_as_torchvision_does() -> None:
    torch.manual_seed(0)
    image = torch.zeros(3, 2, 2)
    theirs = v2.ColorJitter(0.4, (0.5, 2.0), 1.5, 0.3)
    names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
    drawn = [theirs.make_params([image]) for _ in range(2000)]
    ours = ColorJitter(0.4, (0.5, 2.0), 1.5, 0.3).make_params(image.expand(2000, -1, -1, -1))
    assert_same_distribution(ours, stack([{name: p[name] for name in names} for p in drawn]))


def test_grayscale_equals_torchvision() -> None:
    images = smooth_images() / 255
    assert_same(RandomGrayscale(1)(images), v2.RandomGrayscale(1)(images), 0.01)


def test_gaussian_blur_of_same_sigma_equals_torchvision() -> None:
    images = smooth_images() / 255
    theirs = v2.GaussianBlur((5, 9), (0.1, 3.0))
    params = [theirs.make_params([image]) for image in images]
    expected = [theirs.transform(i, p) for i, p in zip(images, params, strict=True)]
    sigma = torch.tensor([p["sigma"][0] for p in params])
    ours = GaussianBlur((9, 5)).transform(images, {"sigma": sigma})
    assert_same(ours, torch.stack(expected), 0.01)


POLICIES: list[tuple[Augmentation, Any]] = [
    (TrivialAugmentWide(), v2.TrivialAugmentWide()),
    (RandAugment(1, 17), v2.RandAugment(1, 17)),
]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("ours", "theirs"), POLICIES, ids=["trivial", "randaugment"])
def test_policy_operation_of_same_magnitude_equals_torchvision(
    ours: Augmentation, theirs: Any, name: str
) -> None:
    images = smooth_images()
    table, is_signed = theirs._AUGMENTATION_SPACE[name]
    values = table(31, *images.shape[-2:])
    bins = torch.full((COUNT,), 17) if isinstance(ours, RandAugment) else torch.arange(0, 31, 2)
    magnitude = torch.zeros(COUNT) if values is None else values[bins].float()
    if is_signed:
        magnitude[::2] *= -1
    # torchvision uses bytes; floats compare without its rounding, where there are no 8-bit levels.
    inputs = images if name in EIGHT_BIT else images / 255
    expected = [
        theirs._apply_image_or_video_transform(
            image, name, float(m), v2.InterpolationMode.NEAREST, theirs._fill
        )
        for image, m in zip(inputs, magnitude, strict=True)
    ]
    operation = torch.full((COUNT, 1), OPERATIONS.index(name))
    result = ours.transform(images / 255, {"operation": operation, "magnitude": magnitude[:, None]})
    scale = 255 if name in EIGHT_BIT else 1
    steps = 1.01 if name == "AutoContrast" else 0.01  # torchvision truncates
    assert_same(result, torch.stack(expected) / scale, steps, 2e-3)


@pytest.mark.parametrize(("ours", "theirs"), POLICIES, ids=["trivial", "randaugment"])
def test_policy_draws_operations_and_magnitudes_of_torchvision(
    ours: Augmentation, theirs: Any
) -> None:
    torch.manual_seed(0)
    images = torch.zeros(1, 1, 1, 1).expand(20_000, 1, 34, 46)
    drawn = ours.make_params(images)
    counts = drawn["operation"].flatten().bincount(minlength=len(OPERATIONS))
    assert tuple(theirs._AUGMENTATION_SPACE) == OPERATIONS
    assert ((counts / len(images) - 1 / 14).abs() < 0.01).all()
    for index, (table, is_signed) in enumerate(theirs._AUGMENTATION_SPACE.values()):
        magnitude = drawn["magnitude"][drawn["operation"] == index]
        values = table(31, 34, 46)
        allowed = torch.zeros(1) if values is None else values.float()
        if isinstance(ours, RandAugment) and values is not None:
            allowed = allowed[17:18]
        found = magnitude.abs().unique()
        torch.testing.assert_close(found, allowed.abs().unique(), rtol=0, atol=1e-5)
        share = (magnitude[magnitude != 0] < 0).float().mean()
        assert (0.45 < share < 0.55) if is_signed else magnitude.min() >= 0


def test_rand_augment_applies_operations_one_after_the_other() -> None:
    images = smooth_images() / 255
    invert, rotate = OPERATIONS.index("Solarize"), OPERATIONS.index("Rotate")
    operation = torch.tensor([[invert, rotate]]).expand(COUNT, -1)
    magnitude = torch.tensor([[0.0, 30.0]]).expand(COUNT, -1)
    result = RandAugment().transform(
        images.clone(), {"operation": operation, "magnitude": magnitude}
    )
    expected = v2.functional.rotate(1 - images, 30)
    assert_same(result, expected, 0.01, 1e-3)
