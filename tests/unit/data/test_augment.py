"""What holds for every augmentation: shapes, dtypes, draws for each image, errors, no waiting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from app.config.instantiate import Instantiator
from app.data import rows
from app.data.augment import (
    Augmentation,
    ColorJitter,
    GaussianBlur,
    RandAugment,
    RandomAffine,
    RandomErasing,
    RandomFlip,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomShift,
    RandomVerticalFlip,
    TrivialAugmentWide,
)
from app.runtime.errors import UserError
from tests.support.runs import job_for

AUGMENTATIONS = [
    ColorJitter(0.5, 0.5, 0.5, 0.3, p=0.8),
    GaussianBlur(5, p=0.8),
    RandAugment(),
    RandomAffine(30, (0.2, 0.2), (0.5, 2.0), (-10, 10, -5, 5), "bilinear"),
    RandomErasing(0.8),
    RandomErasing(0.8, value="random"),
    RandomFlip(),
    RandomGrayscale(0.5),
    RandomHorizontalFlip(),
    RandomResizedCrop((8, 9)),
    RandomShift(3),
    RandomVerticalFlip(),
    TrivialAugmentWide(),
]
ALL = pytest.mark.parametrize("augment", AUGMENTATIONS, ids=lambda a: type(a).__name__)


class OnDevice(Tensor):
    """Tensor that claims not to be on the CPU."""

    is_cpu = False


class NoReads(TorchDispatchMode):
    """Refuses what makes the host wait for a CUDA device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh"), name
        if name == "index":
            assert not any(index is not None and index.dtype == torch.bool for index in args[1])
        return func(*args, **(kwargs or {}))


def images_of(dtype: torch.dtype, *shape: int) -> Tensor:
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    return pixels if dtype == torch.uint8 else (pixels / 255).to(dtype)


@ALL
@pytest.mark.parametrize("shape", [(0, 3, 7, 5), (9, 3, 1, 1), (9, 1, 6, 6), (3, 7, 5), (3, 1, 9)])
def test_augmentation_keeps_shape_dtype_and_input(
    augment: Augmentation, shape: tuple[int, ...]
) -> None:
    for dtype in (torch.uint8, torch.float32, torch.float16):
        images = images_of(dtype, *shape)
        before = images.clone()
        result = augment(images)
        size = (8, 9) if isinstance(augment, RandomResizedCrop) else shape[-2:]
        assert (result.dtype, result.shape) == (dtype, (*shape[:-2], *size))
        assert ((result >= 0) & (result <= 255 if dtype == torch.uint8 else result <= 1)).all()
        assert torch.equal(images, before)


@ALL
def test_augmentation_draws_for_each_image(augment: Augmentation) -> None:
    torch.manual_seed(0)
    image = images_of(torch.uint8, 1, 3, 12, 12)
    results = augment(image.expand(32, -1, -1, -1))
    count = len({result.numpy().tobytes() for result in results})
    assert count == 2 if isinstance(augment, (RandomHorizontalFlip, RandomGrayscale)) else count > 9


@ALL
def test_augmentation_batch_of_one_equals_single_image(augment: Augmentation) -> None:
    image = images_of(torch.float32, 3, 12, 12)
    for seed in range(5):
        torch.manual_seed(seed)
        single = augment(image)
        torch.manual_seed(seed)
        assert torch.equal(augment(image[None])[0], single)


@ALL
def test_augmentation_in_chunks_equals_one_of_all(
    augment: Augmentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = images_of(torch.float32, 9, 3, 12, 12)
    torch.manual_seed(0)
    expected = augment(images)
    monkeypatch.setattr(rows, "CHUNK_BYTES", 4 * images[:4].numel())
    torch.manual_seed(0)
    torch.testing.assert_close(augment(images), expected, rtol=0, atol=1e-6)  # vectorized sums


@ALL
def test_augmentation_is_reproduced_by_the_generator_state(augment: Augmentation) -> None:
    images = images_of(torch.float32, 8, 3, 12, 12)
    state = torch.get_rng_state()
    first = augment(images)
    assert not torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(state)
    assert torch.equal(augment(images), first)


@ALL
def test_augmentation_of_bytes_and_floats_agrees(augment: Augmentation) -> None:
    images = images_of(torch.uint8, 64, 3, 12, 12)
    torch.manual_seed(0)
    of_bytes = augment(images)
    torch.manual_seed(0)
    of_floats = augment(images / 255)
    # Half a step of rounding, and one of the fixed-point resize of bytes.
    torch.testing.assert_close(of_bytes / 255, of_floats, rtol=0, atol=1.01 / 255)


@ALL
def test_augmentation_on_other_devices_neither_waits_nor_differs(augment: Augmentation) -> None:
    """The batched code that CUDA runs, without a host that reads values from the device."""
    images = images_of(torch.float32, 64, 3, 12, 12)
    torch.manual_seed(0)
    expected = augment(images)
    torch.manual_seed(0)
    with NoReads():
        result = augment(images.as_subclass(OnDevice))
    torch.testing.assert_close(result.as_subclass(Tensor), expected, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@ALL
def test_augmentation_does_not_synchronize_cuda(augment: Augmentation) -> None:
    images = images_of(torch.float32, 8, 3, 12, 12).cuda()
    augment(images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("images", "problem"),
    [
        (torch.rand(4, 5), r"images of shape \(4, 5\) are not valid; allowed: \(C, H, W\) or"),
        (torch.zeros(3, 4, 4).long(), r"images of dtype torch.int64 are not valid; allowed: uint8"),
    ],
)
def test_augmentation_other_input_is_refused(images: Tensor, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        RandomHorizontalFlip()(images)


def test_color_of_two_channels_is_refused() -> None:
    with pytest.raises(UserError, match="images with 2 channels have no color; allowed: 1 or 3"):
        RandomGrayscale(p=1.0)(torch.rand(2, 4, 4))


@pytest.mark.parametrize(
    ("build", "problem"),
    [
        (lambda: RandomShift(0), "pixels=0 is not valid; allowed: an integer, at least 1"),
        (lambda: RandomFlip(2), "probability=2 is not valid; allowed: a number from 0 to 1"),
        (lambda: RandomVerticalFlip("x"), "p='x' is not valid; allowed: a number from 0 to 1"),
        (lambda: RandomResizedCrop(0), "size=0 is not valid; allowed: a positive integer"),
        (lambda: RandomResizedCrop([1, 2, 3]), r"size=\[1, 2, 3\] is not valid"),
        (lambda: RandomResizedCrop(8, 0.5), r"scale=0.5 is not valid; allowed: \[min, max\]"),
        (lambda: RandomResizedCrop(8, (0.5, 2)), r"scale=\(0.5, 2\) .* between 0 and 1$"),
        (lambda: RandomResizedCrop(8, ratio=(2, 1)), r"ratio=\(2, 1\) is not valid"),
        (lambda: RandomAffine(-1), "degrees=-1 is not valid; allowed: a number from 0 to 360, or"),
        (lambda: RandomAffine(0, (0.1,)), r"translate=\(0.1,\) is not valid; allowed: two"),
        (lambda: RandomAffine(0, scale=(0, 1)), r"scale=\(0, 1\) is not valid"),
        (lambda: RandomAffine(0, shear=(1, 2, 3)), r"shear=\(3,\) is not valid"),
        (lambda: RandomAffine(0, interpolation="cubic"), "'cubic' .*; allowed: nearest, bilinear"),
        (lambda: RandomAffine(0, fill=255), "fill=255 is not valid; allowed: a number from 0 to 1"),
        (lambda: RandomErasing(value="mean"), "value='mean' is not valid; allowed: random, a"),
        (lambda: ColorJitter(-0.1), "brightness=-0.1 is not valid; allowed: a number from 0"),
        (lambda: ColorJitter(hue=0.7), "hue=0.7 is not valid; allowed: a number from 0 to 0.5, or"),
        (lambda: ColorJitter(saturation=(1, 0)), r"saturation=\(1, 0\) is not valid"),
        (lambda: GaussianBlur(4), "kernel_size=4 is not valid; allowed: odd integers"),
        (lambda: GaussianBlur(3, (0, 1)), r"sigma=\(0, 1\) is not valid"),
        (lambda: RandAugment(-1), "num_ops=-1 is not valid; allowed: an integer, at least 0"),
        (lambda: RandAugment(2, 31), "magnitude=31 .*: an integer, at least 0 and at most 30"),
        (lambda: TrivialAugmentWide(1), "num_magnitude_bins=1 is not valid"),
    ],
)
def test_augmentation_bad_argument_names_value_and_allowed(
    build: Callable[[], object], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        build()


def test_data_augment_options_are_built_and_applied() -> None:
    files = (Path(__file__).parents[3] / "conf" / "data" / "augment").glob("*.yaml")
    options = {file.stem for file in files} - {"none"}
    config = job_for("data=cifar10", f"data/augment=[{','.join(sorted(options))}]").config
    built = Instantiator().build_all("data.augment", config.data.augment)
    assert len(built) > len(options) and all(isinstance(a, Augmentation) for a in built.values())
    assert all(
        augment(torch.rand(4, 3, 32, 32)).shape == (4, 3, 32, 32) for augment in built.values()
    )


def test_data_augment_none_removes_what_the_data_sets() -> None:
    config = job_for("data=cifar10", "data/augment=none").config
    assert Instantiator().build_all("data.augment", config.data.augment) == {}
