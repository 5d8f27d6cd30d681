"""Images decoded once: the same samples as without a cache, and files that are never stale."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import Dataset
from torchvision.transforms import v2

from app.config.instantiate import Instantiator
from app.config.schema import Job
from app.data.batch import BatchLoader
from app.data.datamodule import make_datasets, make_loaders
from app.data.image_cache import FitImage, ImageCache
from app.data.images import ImageFolder, decode_image, image_folder
from app.data.masks import MaskFolder, mask_folder
from app.data.transform import ResizeCenterCrop, resized_side
from app.runtime.errors import StorageError, UserError
from tests.support.data_files import write_data
from tests.support.image_files import write_image_folder, write_mask_folder
from tests.support.runs import config_issues, job_for

TRAIN_LIKE_EVAL = "data.transforms.train=${data.transforms.eval}"


@pytest.fixture
def images(tmp_path: Path) -> ImageFolder:
    write_image_folder(tmp_path / "pets", {"cat": 4, "dog": 3})
    dataset = image_folder(str(tmp_path / "pets"))
    assert isinstance(dataset, ImageFolder)
    return dataset


def disk_cache(images: ImageFolder, side: int = 16) -> ImageCache:
    return ImageCache("disk", FitImage(side, side), images.root.parent / "cache", 2)


def load(cache: ImageCache, images: ImageFolder) -> torch.Tensor:
    samples = cache.load(images, torch.arange(len(images)))
    return samples.arrays.tensors[0][samples.rows]


def cache_file(images: ImageFolder) -> Path:
    (path,) = (images.root.parent / "cache").glob("images-*.safetensors")
    return path


def loaders_for(*overrides: str) -> dict[str, BatchLoader]:
    job = job_for("data.batch_size=6", *overrides)
    return loaders_of(job, job.config.mode)


def loaders_of(job: Job, mode: str) -> dict[str, BatchLoader]:
    build, config = Instantiator(job.trusted), replace(job.config, mode=mode)
    datasets = make_datasets(config, build)
    return make_loaders(config, build, datasets, torch.device("cpu"), torch.contiguous_format)


def stage_batches(loader: BatchLoader, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = zip(*loader.epoch(epoch), strict=True)  # type: ignore[arg-type]
    return torch.cat(inputs), torch.cat(targets)


@pytest.mark.parametrize(("image_size", "eval_crop"), [(16, 0.875), (17, 0.9), (18, None)])
def test_centre_crop_of_a_fitted_image_is_that_of_the_whole_image(
    image_size: int, eval_crop: float | None
) -> None:
    side = resized_side(image_size, eval_crop)
    fit, crop = FitImage(side, side, image_size % 4), ResizeCenterCrop(image_size, eval_crop)
    for height, width in product((side, 40, 41, 43), (side, 50, 51, 53, 54)):
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        assert torch.equal(crop(fit(image)), crop(image)), (height, width)


def test_fitted_image_of_two_sides_covers_both() -> None:
    image = torch.randint(0, 256, (3, 375, 500), dtype=torch.uint8)
    assert torch.equal(FitImage(256, 341)(image), v2.functional.resize(image, 256))
    assert FitImage(40, 10)(image).shape == FitImage(10, 40)(image).mT.shape == (3, 40, 10)


@pytest.mark.parametrize("kind", ["memory", "disk"])
@pytest.mark.parametrize("name", ["image_folder", "masks", "hugging_face"])
def test_cached_samples_are_those_without_a_cache(name: str, kind: str, tmp_cwd: Path) -> None:
    overrides = [
        f"data={name}",
        *write_data(name, tmp_cwd),
        TRAIN_LIKE_EVAL,
        "data.augment.flip=null",
    ]
    plain = loaders_for(*overrides, "data.loader.num_workers=0")
    cached = loaders_for(*overrides, f"data.cache={kind}")
    for stage, epoch in product(("train", "valid", "test"), (1, 2)):
        expected, found = (stage_batches(loaders[stage], epoch) for loaders in (plain, cached))
        assert torch.equal(found[0], expected[0]), stage
        assert torch.equal(found[1], expected[1]), stage
    first = cached["valid"].first(2)
    assert torch.equal(first[0], plain["valid"].first(2)[0])  # type: ignore[index]


def test_masks_of_a_cache_keep_their_labels_and_move_with_their_images(tmp_cwd: Path) -> None:
    overrides = ["data=masks", *write_data("masks", tmp_cwd), "data.cache_size=24"]
    loaders = [loaders_for(*overrides, f"data.cache={kind}") for kind in ("memory", "disk")]
    for stage, epoch in product(("train", "test"), (1, 2)):
        batches = []
        for stages in loaders:
            torch.manual_seed(epoch)
            batches.append(stage_batches(stages[stage], epoch))
        (images, masks), (same_images, same_masks) = batches
        assert torch.equal(images, same_images)
        assert torch.equal(masks, same_masks)
        assert masks.dtype == torch.int64
        assert set(masks.unique().tolist()) == {0, 1, 2}
        gray = images.mean(
            1
        )  # apart from noise and edges, objects are brighter than the background
        bright = gray > (gray[masks > 0].mean() + gray[masks == 0].mean()) / 2
        agreement = [(bright == (m > 0)).double().mean() for m in (masks, masks.flip(-1))]
        assert agreement[0] > 0.85 > 0.7 > agreement[1], agreement


def test_masks_in_a_cache_file_are_renewed_with_the_colors_and_the_files(tmp_path: Path) -> None:
    write_mask_folder(tmp_path / "street", 3)
    cache = ImageCache("disk", FitImage(16, 16, stretch=True), tmp_path / "cache", 2)
    mask = tmp_path / "street" / "masks" / "001.png"

    def cached_masks(**options: object) -> torch.Tensor:
        images = mask_folder(str(tmp_path / "street"), **options)  # type: ignore[arg-type]
        assert isinstance(images, MaskFolder)
        return cache.load(images, torch.arange(3)).arrays.tensors[1]

    before = cached_masks().clone()
    Image.fromarray(np.full((32, 40), 2, np.uint8)).save(mask)
    changed = cached_masks()
    assert (changed[1] == 2).all()
    assert torch.equal(changed[[0, 2]], before[[0, 2]])
    for path in (tmp_path / "street" / "masks").iterdir():
        Image.fromarray(np.full((32, 40 - 8 * (path != mask)), 1, np.uint8)).save(path)
    colors = ["#000000", "#010101"]
    assert (cached_masks(colors=colors) == 1).all()
    assert (cached_masks(colors=colors[::-1]) == 0).all()


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_automatic_normalization_measures_the_cached_training_part(
    kind: str, tmp_cwd: Path
) -> None:
    write_image_folder(tmp_cwd / "pets", {"cat": 20, "dog": 20})
    folder = ("data=image_folder", "data.path=pets", "data.image_size=16", f"data.cache={kind}")
    folder += ("data.eval_crop=1.0", TRAIN_LIKE_EVAL)
    plain = loaders_for(*folder, "data.normalize=null", "data.augment.flip=null")
    pixels = stage_batches(plain["train"], 1)[0].double()
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)
    auto = "data.normalize={mean: auto, std: auto}"
    job = job_for("data.batch_size=6", *folder, auto)
    for mode, stage in (("train", "valid"), ("train", "train"), ("test", "test")):
        loaders = loaders_of(job, mode)
        transform = loaders[stage].prepare.transform  # type: ignore[attr-defined]
        torch.testing.assert_close(transform.mean.flatten(), mean.float())
        torch.testing.assert_close(transform.std.flatten(), std.float())


def test_ranks_divide_the_cached_batches(tmp_cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["data=image_folder", *write_data("image_folder", tmp_cwd), TRAIN_LIKE_EVAL]
    loaders = loaders_for(*overrides, "data.augment.flip=null", "data.cache=disk")
    shares = {}
    for rank in (0, 1):
        share = slice(None, 4) if rank == 0 else slice(4, None)
        with monkeypatch.context() as patch:
            patch.setattr(
                "app.data.loaders.local_slice", lambda count, s=share: slice(*s.indices(count))
            )
            shares[rank] = [next(iter(loaders[stage].epoch(2))) for stage in ("train", "test")]
    for number, stage in enumerate(("train", "test")):
        whole = next(iter(loaders[stage].epoch(2)))
        for part in (0, 1):  # inputs, labels
            joined = torch.cat([shares[rank][number][part] for rank in (0, 1)])  # type: ignore[index]
            assert torch.equal(joined, whole[part]), stage  # type: ignore[index]


def test_stages_of_one_folder_share_an_array_and_a_mode_reads_only_its_own(
    tmp_cwd: Path,
) -> None:
    write_image_folder(tmp_cwd / "pets", {"cat": 20, "dog": 20})
    overrides = ("data=image_folder", "data.path=pets", "data.image_size=16", "data.cache=memory")
    tensors = [loader.tensors[0] for loader in loaders_for(*overrides).values()]  # type: ignore[attr-defined]
    assert all(a is b for a, b in pairwise(tensors))
    assert len(tensors[0]) == 40
    alone = loaders_for(*overrides, "mode=find_lr")["train"]
    assert len(alone.tensors[0]) == alone.num_samples == 32  # type: ignore[attr-defined]


def test_training_crops_of_the_cache_differ_by_epoch_and_repeat(tmp_cwd: Path) -> None:
    overrides = ("data=image_folder", *write_data("image_folder", tmp_cwd), "data.cache=memory")
    train = loaders_for(*overrides)["train"]
    batches = []
    for epoch in (1, 1, 2):
        torch.manual_seed(epoch)
        batches.append(stage_batches(train, 1)[0])
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


def test_cache_file_is_read_again_and_is_a_safetensors_file(
    images: ImageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(disk_cache(images), images)
    assert torch.equal(load_file(cache_file(images))["images"].permute(0, 3, 1, 2), first)
    expected = FitImage(16, 16)(images[5][0])
    assert torch.equal(first[5], expected)
    monkeypatch.setattr(ImageCache, "_write", lambda *_: pytest.fail("written again"))
    assert torch.equal(load(disk_cache(images), images), first)


@pytest.mark.parametrize("change", ["touched", "changed", "added", "removed"])
def test_cache_file_of_other_images_is_renewed(images: ImageFolder, change: str) -> None:
    load(disk_cache(images), images)
    path = images.root / images.paths[2]
    if change == "touched":
        os.utime(path, ns=(0, 0))
    elif change == "changed":
        Image.fromarray(np.full((20, 20, 3), 7, np.uint8)).save(path)
    elif change == "added":
        Image.fromarray(np.full((20, 20, 3), 7, np.uint8)).save(path.with_name("x.png"))
    else:
        path.unlink()
    before = cache_file(images).read_bytes()
    renewed = image_folder(str(images.root))
    assert isinstance(renewed, ImageFolder)
    found = load(disk_cache(renewed), renewed)
    assert cache_file(images).read_bytes() != before
    assert torch.equal(found, torch.stack([FitImage(16, 16)(x) for x, _ in renewed]))


@pytest.mark.parametrize("damage", ["truncated", "header", "empty", "text"])
def test_damaged_cache_file_is_found_and_renewed(
    images: ImageFolder, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = load(disk_cache(images), images).clone()
    path = cache_file(images)
    content = path.read_bytes()
    damaged = {
        "truncated": content[:-1],
        "header": content[:20] + bytes([content[20] ^ 1]) + content[21:],
        "empty": b"",
        "text": b"x" * len(content),
    }
    path.write_bytes(damaged[damage])
    assert torch.equal(load(disk_cache(images), images), expected)
    assert path.read_bytes() == content
    assert "is damaged, or its images have changed" in caplog.text


def test_interrupted_build_leaves_no_file(
    images: ImageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(path: str, **options: Any) -> torch.Tensor:
        if path.endswith(images.paths[4]):
            raise KeyboardInterrupt
        return decode_image(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr("app.data.images.decode_image", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load(disk_cache(images), images)
    names = [path.name for path in (images.root.parent / "cache").iterdir()]
    assert [name for name in names if not name.endswith(".lock")] == []
    assert len(load(disk_cache(images), images)) == 7


def test_full_disk_is_one_error_with_path_and_bytes(
    images: ImageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, f"no space for {start} to {size}")

    monkeypatch.setattr(os, "posix_fallocate", fail, raising=False)
    with pytest.raises(StorageError, match=r"images-16x16-.*safetensors \(5,\d\d\d bytes\) cannot"):
        load(disk_cache(images), images)
    assert not list((images.root.parent / "cache").glob("*.safetensors"))


def test_read_only_folder_of_images_is_cached_elsewhere(images: ImageFolder) -> None:
    for folder in (images.root / "cat", images.root / "dog", images.root):
        folder.chmod(0o500)
    assert len(load(disk_cache(images), images)) == 7


def test_data_that_cannot_be_cached_are_refused(tmp_cwd: Path) -> None:
    overrides = ["data=npz", *write_data("npz", tmp_cwd), "data.cache=memory"]
    (issue,) = config_issues(*overrides)
    assert "data.cache: the train data (TensorDataset) are not image files" in issue
    overrides = ["data=image_folder", *write_data("image_folder", tmp_cwd)]
    (issue,) = config_issues(*overrides, "data.normalize={mean: auto, std: auto}")
    assert "data.normalize=auto needs a dataset in memory, or data.cache for image files" in issue
    with pytest.raises(UserError, match=r"data\.cache_size=\[16\]; allowed: a number of pixels"):
        loaders_for(*overrides, "data.cache=memory", "data.cache_size=[16]")


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_images_of_different_channels_are_one_error(kind: str, tmp_path: Path) -> None:
    class Mixed(Dataset[tuple[torch.Tensor, int]]):
        location, targets = "mixed", [0, 1]

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.zeros(3 - 2 * index, 20, 20, dtype=torch.uint8), index

        def fingerprint(self) -> str:
            return ""

    cache = ImageCache(kind, FitImage(16, 16), tmp_path, 1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"sample 1 has 1 channels, that of sample 0 has 3"):
        cache.load(Mixed(), torch.arange(2))
