"""Samples read by worker processes."""

from __future__ import annotations

import torch

from app.data.batch import BatchPreparer
from app.data.cached import cached
from app.data.loaders import DataLoaderOptions, SampleLoader
from app.data.sampling import EpochSampler
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
