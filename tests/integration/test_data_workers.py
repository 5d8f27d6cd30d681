"""Samples read by worker processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.data.batch import BatchPreparer
from app.data.cached import cached
from app.data.images import ImageFolder
from app.data.loaders import DataLoaderOptions, SampleLoader
from app.data.sampling import EpochSampler
from app.runtime.errors import UserError
from tests.support.image_files import damage_image, write_image_folder
from tests.support.toy_datasets import NoisyDataset, array_dataset


def noisy_loader(num_workers: int) -> SampleLoader:
    sampler = EpochSampler.from_limit(7, 3, None, shuffle_seed=0)
    options = DataLoaderOptions(num_workers, persistent_workers=num_workers > 0)
    prepare = BatchPreparer(torch.device("cpu"), lambda x: x)
    return SampleLoader(NoisyDataset(), sampler, 3, prepare, 5, options)


def test_sample_loader_gives_same_samples_with_and_without_workers() -> None:
    main_process, workers = noisy_loader(0), noisy_loader(2)
    for epoch in (1, 2):
        for (x, y), (a, b) in zip(main_process.epoch(epoch), workers.epoch(epoch), strict=True):
            assert torch.equal(x, a)
            assert torch.equal(y, b)
    first, second = (torch.cat([x for x, _ in main_process.epoch(n)]).sort().values for n in (1, 2))
    assert not torch.equal(first, second), "every epoch draws other random numbers"


def test_cached_reads_same_samples_with_and_without_workers() -> None:
    for with_workers, without in zip(
        cached(array_dataset(), num_workers=2).tensors,
        cached(array_dataset()).tensors,
        strict=True,
    ):
        assert torch.equal(with_workers, without)


def test_damaged_image_is_one_line_with_and_without_workers(tmp_path: Path) -> None:
    write_image_folder(tmp_path, {"cat": 4})
    damage_image(tmp_path / "cat" / "002.png")
    dataset = ImageFolder(tmp_path, [f"cat/00{i}.png" for i in range(4)], [0] * 4, ["cat"], "")
    sampler = EpochSampler.from_limit(4, 1, None, shuffle_seed=None)
    prepare = BatchPreparer(torch.device("cpu"), lambda x: x)
    for num_workers in (0, 1):
        options = DataLoaderOptions(num_workers)
        loader = SampleLoader(dataset, sampler, 1, prepare, 0, options)
        with pytest.raises(UserError) as error:
            list(loader.epoch(1))
        assert str(error.value).startswith(f"{tmp_path}/cat/002.png cannot be read as an image: ")
        assert "\n" not in str(error.value)
