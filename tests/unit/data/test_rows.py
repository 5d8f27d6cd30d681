"""Rows of large tensors in threads: each once, the same for any number, one core per thread."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from threading import Thread

import pytest
import torch
from torch import Tensor

from app.data import rows
from app.data.augment import (
    Augmentation,
    ColorJitter,
    RandomFlip,
    RandomGrayscale,
    RandomResizedCrop,
    RandomShift,
)
from app.data.rows import chunk_size, for_chunks, select_rows, thread_pool
from app.data.transform import BatchTransform
from app.runtime.errors import UserError

IMAGE_BYTES = 3 * 40 * 48


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Keep the number of threads of other tests."""
    default = torch.get_num_threads()
    yield
    torch.set_num_threads(default)


def images_in_channels_last() -> Tensor:
    pixels = torch.randint(0, 256, (21, 40, 48, 3), dtype=torch.uint8)
    return pixels.permute(0, 3, 1, 2)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_batch_transform_gives_the_same_for_any_number_of_threads(
    memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "CHUNK_BYTES", 2 * IMAGE_BYTES)
    mean, std = torch.rand(2, 3, 1, 1) + 0.1
    steps = [RandomFlip(), ColorJitter(0.4, 0.4, 0.4), RandomGrayscale(0.5)]
    images, index = images_in_channels_last(), torch.randperm(21)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        transform = BatchTransform(
            mean, std, None, None, memory_format, [RandomResizedCrop(32)], steps
        )
        torch.manual_seed(0)
        results.append(transform(select_rows(images, index)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("crops", [[RandomResizedCrop(32)], [RandomResizedCrop((20, 44))], []])
def test_batch_transform_of_bytes_equals_one_step_after_the_other(
    crops: list[Augmentation], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "CHUNK_BYTES", 2 * IMAGE_BYTES)
    torch.set_num_threads(count)
    mean, std = torch.rand(2, 3, 1, 1) + 0.1
    steps, images = [RandomFlip(), RandomShift(3)], images_in_channels_last()
    transform = BatchTransform(mean, std, None, None, torch.channels_last, crops, steps)
    torch.manual_seed(0)
    result = transform(images)
    torch.manual_seed(0)
    for step in (*crops, *steps):
        images = step(images)
    assert torch.equal(result, images.float().div(255).sub(mean).div(std))
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("count", [1, 3])
def test_for_chunks_passes_every_row_once_and_raises_the_error_of_a_chunk(count: int) -> None:
    torch.set_num_threads(count)
    source, result = torch.arange(10), torch.zeros(10, dtype=torch.int64)
    sizes = []

    def add(result: Tensor, source: Tensor) -> None:
        sizes.append(len(source))
        result += source

    for_chunks(add, 4, result, source)
    assert torch.equal(result, source)
    assert sorted(sizes) == [2, 4, 4]

    def fail(source: Tensor) -> None:
        if 5 in source:
            raise UserError("row 5")

    with pytest.raises(UserError, match="row 5"):
        for_chunks(fail, 4, source)


def test_thread_pool_uses_one_core_per_thread_and_leaves_other_threads_alone() -> None:
    torch.set_num_threads(3)
    thread_pool.cache_clear()
    pool = thread_pool(4)
    assert {*pool.map(lambda _: torch.get_num_threads(), range(16))} == {1}
    later: list[int] = []
    thread = Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert [torch.get_num_threads(), *later] == [3, 3]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_process_starts_threads_of_its_own() -> None:
    torch.set_num_threads(2)
    assert [*thread_pool(2).map(abs, [-1])] == [1]
    child = multiprocessing.get_context("fork").Process(
        target=for_chunks, args=(len, 1, torch.zeros(3))
    )
    child.start()
    child.join(timeout=60)
    exit_code = child.exitcode
    child.kill()
    assert exit_code == 0


def test_chunk_size_is_that_of_the_values_that_are_computed_with() -> None:
    image = torch.zeros(5, 3, 224, 224, dtype=torch.uint8)
    assert (chunk_size(image), chunk_size(image, 4)) == (6, 1)
    assert chunk_size(torch.zeros(1, 3, 2000, 2000)) == 1
    assert chunk_size(torch.zeros(0, 3)) > 0


@pytest.mark.parametrize("shape", [(7,), (7, 4), (7, 3, 5, 6), (7, 3, 1, 1), (7, 1, 5, 6)])
def test_select_rows_equals_indexing_in_the_memory_format(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "CHUNK_BYTES", 100)
    torch.set_num_threads(2)
    index = torch.tensor([6, 0, 0, 3])
    tensor = torch.rand(shape)
    tensors = [tensor, tensor[:1].expand(7, *shape[1:])]
    if len(shape) == 4:
        tensors.append(tensor.contiguous(memory_format=torch.channels_last))
    for values in tensors:
        selected = select_rows(values, index)
        assert torch.equal(selected, values[index])
        assert len(shape) < 4 or selected.stride()[1:] == values.stride()[1:]
    assert select_rows(tensor, index[:0]).shape == (0, *shape[1:])
