"""Folders of image files: layouts, damaged files, copies."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from app.config.instantiate import Instantiator
from app.data import image_checks
from app.data.augment import RandomResizedCrop
from app.data.datamodule import make_datasets, make_loaders
from app.data.image_cache import FitImage, ImageCache
from app.data.image_checks import check_images, find_duplicates, image_problem
from app.data.images import ImageFolder, decode_image, image_folder
from app.data.split import check_datasets, dataset_labels, sample_files, sample_paths, subset
from app.data.transform import ResizeCenterCrop, TransformedDataset
from app.runtime.errors import UserError
from tests.support.image_files import damage_image, write_image_folder
from tests.support.runs import job_for


def read_stages(root: Path) -> dict[str, ImageFolder | None]:
    stages = image_folder(str(root))
    assert isinstance(stages, dict)
    return stages


def test_image_folder_reads_images_and_refuses_damaged_ones(tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"cat": 3, "dog": 3})
    (tmp_path / ".hidden").mkdir()
    dataset = image_folder(str(tmp_path))
    assert isinstance(dataset, ImageFolder)
    pixels, label = dataset[5]
    assert (pixels.shape, pixels.dtype, label) == ((3, 28, 32), torch.uint8, 1)
    assert dataset_labels(dataset, 1).tolist() == [0, 0, 0, 1, 1, 1]  # type: ignore[union-attr]
    part = subset(dataset, torch.tensor([5, 0]))
    assert sample_paths(part) == ["dog/002.png", "cat/000.png"]
    assert sample_files(part) == [tmp_path / "dog/002.png", tmp_path / "cat/000.png"]
    with pytest.raises(UserError, match="has 2 classes: cat, dog"):
        check_datasets({"train": dataset}, 3, 1)
    (tmp_path / "cat" / "000.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"000\.png cannot be read as an image"):
        dataset[0]
    with pytest.raises(UserError, match="is not a folder"):
        image_folder(str(tmp_path / "none"))


@pytest.mark.parametrize("valid", ["valid", "val"])
def test_folders_of_stages_share_the_labels_of_training(tmp_path: Path, valid: str) -> None:
    write_image_folder(tmp_path / "train", {"ant": 2, "bee": 1, "cat": 1})
    write_image_folder(tmp_path / valid, {"bee": 1, "cat": 2})
    stages = read_stages(tmp_path)
    train, valid_data = stages["train"], stages["valid"]
    assert train is not None
    assert valid_data is not None
    assert train.classes == valid_data.classes == ["ant", "bee", "cat"]
    assert valid_data.targets == [1, 2, 2]
    assert valid_data.paths[0] == f"{valid}/bee/000.png"
    assert stages["test"] is None
    assert f"is read as train/, {valid}/ with 3 classes" in train.layout


def test_given_classes_decide_the_labels(tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"dog": 2})
    dataset = image_folder(str(tmp_path), ["ant", "dog"])
    assert isinstance(dataset, ImageFolder)
    assert dataset.targets == [1, 1]


def test_missing_classes_are_refused_with_their_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no class folders.*/cat/1\.jpg and "):
        image_folder(str(tmp_path))
    write_image_folder(tmp_path / "zip", {"cat": 1, "dog": 1})
    with pytest.raises(
        UserError, match=r"only class folder 'zip'; expected .*; did you mean data\.path=.*zip"
    ):
        image_folder(str(tmp_path))
    write_image_folder(tmp_path / "all" / "train", {"cat": 1, "dog": 1})
    write_image_folder(tmp_path / "all" / "test", {"bird": 1})
    with pytest.raises(UserError, match=r"test/bird: 'bird' is not a class of the training data"):
        image_folder(str(tmp_path / "all"))
    shutil.rmtree(tmp_path / "all" / "test")
    (tmp_path / "all" / "train" / "cow").mkdir()
    with pytest.raises(UserError, match=r"train/cow contains no image; allowed: \.bmp, \.jpeg"):
        image_folder(str(tmp_path / "all"))
    write_image_folder(tmp_path / "all" / "val", {"cat": 1})
    write_image_folder(tmp_path / "all" / "valid", {"cat": 1})
    with pytest.raises(UserError, match=r"valid and .*val both exist; allowed: one of them"):
        image_folder(str(tmp_path / "all"))


@pytest.mark.parametrize("names", [("train",), ("train", "val"), ("train", "test")])
def test_stage_folders_without_classes_are_not_taken_for_classes(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    write_image_folder(tmp_path, dict.fromkeys(names, 2))
    with pytest.raises(UserError, match=r"/(train|test) has no class folders; expected are"):
        image_folder(str(tmp_path))


def test_names_that_cannot_be_printed_are_escaped_or_refused(tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"cat": 1, "dog": 1})
    file = tmp_path / "cat" / "000.png"
    file.rename(os.fsdecode(os.fsencode(file.parent) + b"/\xff\n.png"))
    dataset = image_folder(str(tmp_path))
    assert isinstance(dataset, ImageFolder)
    assert dataset[0][0].shape == (3, 24, 32)
    assert sample_paths(dataset) == ["cat/\\udcff\\n.png", "dog/000.png"]
    (tmp_path / "c\x1b[1m").mkdir()
    with pytest.raises(UserError, match=r"the folder 'c\\x1b\[1m' in .* needs a name"):
        image_folder(str(tmp_path))


def test_damaged_images_are_listed_together(tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"cat": 4}, suffix="jpg")
    write_image_folder(tmp_path, {"dog": 2})
    files = sorted(tmp_path.rglob("*.*"))
    check_images(files)
    truncated, empty, text, cut = files[0], files[1], files[2], files[4]
    truncated.write_bytes(truncated.read_bytes()[:-200])
    empty.write_bytes(b"")
    text.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    cut.write_bytes(cut.read_bytes()[:300])
    with pytest.raises(UserError, match="4 of 6 images cannot be read") as error:
        check_images(files)
    lines = str(error.value).splitlines()[1:]
    assert [line.split(": ")[0].strip() for line in lines] == list(
        map(str, (truncated, empty, text, cut))
    )
    assert "the file is empty" in lines[1]
    assert "not an image; allowed: BMP, GIF, JPEG" in lines[2]


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_damage_between_beginning_and_end_is_found_in_data_of_moderate_size(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image_folder(tmp_path, {"cat": 3}, suffix=suffix)
    files = sorted(tmp_path.rglob("*.*"))
    damage_image(files[1])
    with pytest.raises(UserError, match=rf"1 of 3 images cannot .*\n    {files[1]}: "):
        check_images(files)
    monkeypatch.setattr(image_checks, "MAX_DECODED_BYTES", 1000)
    check_images(files)


def test_complete_image_with_bytes_after_its_end_is_accepted(tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"cat": 1}, suffix="jpg")
    (file,) = tmp_path.rglob("*.jpg")
    file.write_bytes(file.read_bytes() + b"appended by a camera")
    assert image_problem(file) is None


def test_copies_in_other_stages_are_listed(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "train", {"cat": 3})
    write_image_folder(tmp_path / "test", {"cat": 2}, seed=1)
    shutil.copy(tmp_path / "train/cat/001.png", tmp_path / "train/cat/002.png")
    files = {stage: sorted((tmp_path / stage).rglob("*.png")) for stage in ("train", "test")}
    assert find_duplicates(files) == []
    shutil.copy(tmp_path / "train/cat/000.png", tmp_path / "test/cat/000.png")
    (warning,) = find_duplicates(files)
    assert warning.startswith("1 images are also in another stage")
    assert "train/cat/000.png (train) = " in warning
    assert "test/cat/000.png (test)" in warning


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tiff"])
def test_decoded_pixels_are_those_of_pillow(tmp_path: Path, mode: str, suffix: str) -> None:
    pixels = torch.randint(0, 256, (20, 30, 4), dtype=torch.uint8).numpy()
    image = Image.fromarray(pixels[..., :3]).convert(mode)
    if mode == "CMYK" and suffix not in ("jpg", "tiff"):
        pytest.skip("the format has no CMYK")
    path = tmp_path / f"x.{suffix}"
    image.save(path)
    expected = pil_to_tensor(Image.open(path).convert("RGB"))
    assert torch.equal(decode_image(str(path)), expected)
    renamed = path.rename(tmp_path / "x.png")  # the first bytes decide
    assert torch.equal(decode_image(str(renamed)), expected)


def write_large_jpeg(path: Path) -> None:
    colors = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8))
    colors.resize((1600, 1200), Image.Resampling.BICUBIC).save(path, quality=90)


@pytest.mark.parametrize(
    ("needed", "size"),
    [(None, (1200, 1600)), (700, (1200, 1600)), (600, (600, 800)), (299, (300, 400))],
)
def test_jpeg_is_decoded_at_the_smallest_size_that_suffices(
    tmp_path: Path, needed: int | None, size: tuple[int, int]
) -> None:
    write_large_jpeg(tmp_path / "image.jpg")
    pixels = decode_image(str(tmp_path / "image.jpg"), needed_side=needed)
    assert pixels.shape == (3, *size)
    full = decode_image(str(tmp_path / "image.jpg"))
    for transform in (ResizeCenterCrop(64), ResizeCenterCrop(64, 0.875)):
        if needed is None or needed >= transform.needed_side:
            difference = (transform(pixels).int() - transform(full).int()).abs()
            assert difference.max() <= 2


def test_stages_decode_what_their_transforms_need(tmp_path: Path) -> None:
    for name in ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_large_jpeg(tmp_path / name)
    job = job_for(
        "data=image_folder",
        f"data.path={tmp_path}",
        "data.image_size=64",
        "model=cnn",
        "data.loader.num_workers=0",
        "data.split.valid=0.25",
        "data.split.test=0.25",
        "data.split.stratify=false",
    )
    instantiate = Instantiator(job.trusted)
    datasets = make_datasets(job.config, instantiate)
    cpu = torch.device("cpu")
    loaders = make_loaders(job.config, instantiate, datasets, cpu, torch.contiguous_format)
    sizes = {}
    for stage, loader in loaders.items():
        samples = loader.loader.dataset  # type: ignore[attr-defined]
        while not isinstance(samples, TransformedDataset):
            samples = samples.dataset
        sizes[stage] = samples.dataset[0][0].shape[-2:]
    assert sizes == {"train": (300, 400), "valid": (150, 200), "test": (150, 200)}


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_cache_decodes_what_its_size_needs(tmp_path: Path, kind: Literal["memory", "disk"]) -> None:
    write_image_folder(tmp_path / "pets", {"cat": 1, "dog": 1})
    write_large_jpeg(tmp_path / "pets" / "cat" / "large.jpg")
    images = image_folder(str(tmp_path / "pets"))
    assert isinstance(images, ImageFolder)
    fit = FitImage(64, 64)
    samples = ImageCache(kind, fit, tmp_path / "cache", 1).load(images, torch.arange(len(images)))
    row = images.paths.index("cat/large.jpg")
    cached = samples.arrays.tensors[0][row]
    full, reduced = (
        fit(decode_image(str(images.root / images.paths[row]), needed_side=side))
        for side in (None, fit.needed_side)
    )
    assert torch.equal(cached, reduced)
    assert not torch.equal(reduced, full)


def test_no_random_crop_is_enlarged_from_the_needed_side() -> None:
    crop = RandomResizedCrop(20, scale=(0.1, 1.0), ratio=(0.5, 2.0))
    side = crop.needed_side
    assert side is not None
    boxes = [crop.draw_boxes(torch.zeros(1, 3, side, side + extra)) for extra in range(200)]
    shortest = min(int(box[name]) for box in boxes for name in ("height", "width"))
    assert shortest >= 20 - 1  # rounded
    assert RandomResizedCrop(20, scale=(0.0, 1.0)).needed_side is None


def test_truncated_jpeg_and_other_formats_are_refused(tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"cat": 1}, suffix="jpg")
    (file,) = tmp_path.rglob("*.jpg")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"000\.jpg cannot be read as an image: image file is trun"):
        decode_image(str(file))
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(UserError, match="its format is EPS; allowed: BMP"):
        decode_image(str(file))
