"""Cache files of images that are built by two processes at once, or by one that is killed."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from app.data.image_cache import FitImage, ImageCache
from app.data.images import ImageFolder, image_folder
from app.data.masks import MaskFolder, mask_folder
from app.runtime.fault_injection import FAULT_VARIABLE
from tests.support.fork_server import start_fork_server
from tests.support.image_files import write_image_folder, write_mask_folder

FIT = FitImage(16, 16, stretch=True)
CONTEXT = mp.get_context("forkserver")


@pytest.fixture(params=["pictures", "masks"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of 8 pictures, with or without masks."""
    if request.param == "masks":
        write_mask_folder(tmp_path / "data", 8)
    else:
        write_image_folder(tmp_path / "data", {"cat": 4, "dog": 4})
    return tmp_path / "data"


def read_samples(root: Path) -> ImageFolder | MaskFolder:
    has_masks = (root / "masks").exists()
    images = mask_folder(str(root)) if has_masks else image_folder(str(root))
    assert not isinstance(images, dict)
    return images


def start_build(root: Path, fault: str = "", start: object = None) -> BaseProcess:
    start_fork_server()
    process = CONTEXT.Process(target=build_cache, args=(root, fault, start))
    process.start()
    return process


def build_cache(root: Path, fault: str, start: object = None) -> None:
    """Load the cache, and check that it contains what is in the files."""
    torch.set_num_threads(1)
    os.environ[FAULT_VARIABLE] = fault or "none:none:0"
    samples = read_samples(root)
    if start is not None:
        start.wait()  # type: ignore[attr-defined]
    cache = ImageCache("disk", FIT, root.parent / "cache", 1)
    images, targets = cache.load(samples, torch.arange(len(samples))).arrays.tensors
    for index, (image, target) in enumerate(samples):
        assert torch.equal(images[index], FIT(image))
        expected = FIT(tv_tensors.Mask(target)) if isinstance(samples, MaskFolder) else target
        assert torch.equal(targets[index], torch.as_tensor(expected))


def exit_code(process: BaseProcess) -> int | None:
    process.join(60)
    process.kill()
    return process.exitcode


def cache_files(root: Path) -> list[str]:
    """Return the endings of the files in the cache, without those of locks."""
    suffixes = sorted(path.suffix for path in (root.parent / "cache").iterdir())
    return [suffix for suffix in suffixes if suffix != ".lock"]


@pytest.mark.parametrize("fault", ["", "mid_write:images-:3", "before_rename:images-:1"])
def test_cache_that_two_processes_build_at_once_is_right_for_both(root: Path, fault: str) -> None:
    start = CONTEXT.Barrier(2)
    first, second = start_build(root, fault, start), start_build(root, "", start)
    assert exit_code(first) in ((0, -signal.SIGKILL) if fault else (0,))
    assert exit_code(second) == 0
    assert cache_files(root) == [".safetensors"]


@pytest.mark.parametrize("place", ["opened", "mid_write", "before_fsync", "before_rename"])
def test_cache_whose_build_is_killed_is_built_by_the_next_run(root: Path, place: str) -> None:
    count = 4 if place == "mid_write" else 1
    assert exit_code(start_build(root, f"{place}:images-:{count}")) == -signal.SIGKILL
    assert cache_files(root) == [".part"]
    if place == "mid_write":  # even if it had its name, as by a process that has no locks
        (part,) = (root.parent / "cache").glob(".*.part")
        part.rename(part.with_name(part.name.removeprefix(".").removesuffix(".part")))
    assert exit_code(start_build(root)) == 0
    assert cache_files(root) == [".safetensors"]


def test_cache_of_a_changed_file_is_built_by_the_next_run(root: Path) -> None:
    assert exit_code(start_build(root)) == 0
    images = read_samples(root)
    paths = images.mask_paths if isinstance(images, MaskFolder) else images.paths
    with Image.open(root / paths[2]) as image:
        pixels = np.asarray(image).copy()
    pixels[:8] = 1
    Image.fromarray(pixels).save(root / paths[2])
    assert exit_code(start_build(root, "after_rename:images-:1")) == -signal.SIGKILL  # was renewed
    assert exit_code(start_build(root, "opened:images-:1")) == 0  # and is not renewed again
    assert cache_files(root) == [".safetensors"]
