"""Loaders of datasets in memory and of single samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from app.data import loaders
from app.data.batch import BatchPreparer
from app.data.loaders import DataLoaderOptions, SampleLoader, TensorLoader
from app.data.sampling import EpochSampler
from app.data.transform import BatchTransform
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


def image_loader(
    shuffle_seed: int | None = 0,
    on_device: bool = True,
    augment: tuple[Callable[[Tensor], Tensor], ...] = (),
    channels: int = 3,
) -> TensorLoader:
    """Return a loader of 50 images as bytes, 10 rows of which are not among its 40 samples."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (50, channels, 6, 6), dtype=torch.uint8, generator=generator)
    dataset = TensorDataset(images, torch.arange(50))
    mean, std = torch.full((channels, 1, 1), 0.3), torch.full((channels, 1, 1), 0.7)
    transform = BatchTransform(mean, std, 8, None, torch.channels_last, augment=augment)
    prepare = BatchPreparer(torch.device("cpu"), transform)
    sampler = EpochSampler.from_limit(40, 7, None, shuffle_seed)
    rows = torch.randperm(50, generator=generator)[:40]
    return TensorLoader(dataset, sampler, 7, prepare, on_device, rows)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shuffle_seed", [0, None])
def test_batches_prepared_together_or_once_equal_those_prepared_one_by_one(
    shuffle_seed: int | None, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "EPOCHS_BEFORE_KEPT", 1)
    loader = image_loader(shuffle_seed, channels=channels)
    first, second = list(loader.epoch(1)), list(loader.epoch(2))
    assert loader.prepared is not None
    monkeypatch.setattr(loaders, "BLOCK_BYTES", 1)
    single = image_loader(shuffle_seed, on_device=False, channels=channels)
    for batches, epoch in ((first, 1), (second, 2)):
        expected = list(single.epoch(epoch))
        assert [len(y) for _, y in batches] == [7, 7, 7, 7, 7, 5]
        for (x, y), (other_x, other_y) in zip(batches, expected, strict=True):
            assert torch.equal(x, other_x)
            assert x.stride() == other_x.stride()
            assert torch.equal(y, other_y)
    assert single.prepared is None


def test_batches_of_prepared_samples_may_be_changed_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loaders, "EPOCHS_BEFORE_KEPT", 1)
    loader = image_loader(shuffle_seed=None)
    before = [x.clone() for x, _ in loader.epoch(1)]
    for epoch in (2, 3):
        for (x, y), expected in zip(loader.epoch(epoch), before, strict=True):
            assert torch.equal(x, expected)
            x.zero_()
            y.zero_()


def test_random_augmentations_are_drawn_for_each_batch_in_its_turn() -> None:
    drawn: list[int] = []
    loader = image_loader(augment=(lambda x: drawn.append(len(x)) or x,))
    for epoch in (1, 2):
        batches = loader.epoch(epoch)
        next(batches)
        assert drawn == [7]
        list(batches)
        assert drawn == [7, 7, 7, 7, 7, 5]
        drawn.clear()


def test_samples_are_prepared_once_only_if_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 40 * (3 * 8 * 8 * 4 + 8)
    for limit, is_kept in ((size - 1, False), (size, True)):
        monkeypatch.setattr(loaders, "MAX_PREPARED_BYTES", limit)
        loader = image_loader()
        for epoch in range(1, 5):
            assert loader.prepared is None
            list(loader.epoch(epoch))
        assert (loader.prepared is not None) == is_kept


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
