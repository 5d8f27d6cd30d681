"""Loaders of datasets in memory and of single samples."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import TensorDataset

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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_that_are_copied_ahead_are_equal() -> None:
    images, labels = torch.randint(0, 256, (5000, 1000), dtype=torch.uint8), torch.arange(5000)
    dataset = TensorDataset(images, labels)
    prepare = BatchPreparer(torch.device("cuda"), lambda x: x.float() / 255)
    sampler = EpochSampler.from_limit(5000, 64, None, shuffle_seed=0)
    ahead, direct = (TensorLoader(dataset, sampler, 64, prepare, on) for on in (False, True))
    busy = torch.randn(2048, 2048, device="cuda")
    for ours, theirs in zip(ahead.epoch(1), direct.epoch(1), strict=True):
        busy = (busy @ busy).tanh()  # the copies run beside this
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_stream_reads_one_batch_at_a_time_without_a_cuda_device() -> None:
    read: list[int] = []

    def batches() -> Iterator[torch.Tensor | None]:
        for number in range(3):
            read.append(number)
            yield None if number == 1 else torch.full((2,), float(number))

    prepared = BatchPreparer(torch.device("cpu"), lambda x: x + 1, None).stream(batches())
    assert next(prepared).tolist() == [1.0, 1.0]
    assert read == [0]
    assert next(prepared) is None
    assert next(prepared).tolist() == [3.0, 3.0]
