"""Loaders of datasets in memory and of single samples."""

from __future__ import annotations

import pytest
import torch

from app.data.batch import BatchPreparer
from app.data.loaders import DataLoaderOptions, SampleLoader, TensorLoader
from app.data.sampling import EpochSampler
from tests.support.toy_datasets import NoisyDataset, arange_dataset

PREPARE = BatchPreparer(torch.device("cpu"), lambda x: x)


@pytest.mark.parametrize("on_device", [True, False])
def test_tensor_loader_yields_every_sample_once(on_device: bool) -> None:
    sampler = EpochSampler.from_limit(10, 4, None, shuffle_seed=0)
    loader = TensorLoader(arange_dataset(), sampler, 4, PREPARE, on_device)
    batches = list(loader.epoch(1))
    assert [len(y) for _, y in batches] == [4, 4, 2]
    assert loader.num_batches == 3
    assert sorted(torch.cat([x for x, _ in batches]).flatten().tolist()) == list(range(10))
    assert all(torch.equal(x.flatten().long() % 3, y) for x, y in batches)


def test_sample_loader_does_not_advance_global_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    sampler = EpochSampler.from_limit(7, 3, None, shuffle_seed=0)
    list(SampleLoader(NoisyDataset(), sampler, 3, PREPARE, 5, DataLoaderOptions()).epoch(1))
    assert torch.equal(torch.rand(1), expected)
