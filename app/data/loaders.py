"""Loaders that yield batches on the training device, in an order that depends on (seed, epoch)."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    TensorDataset,
    default_collate,
    get_worker_info,
)

from app.data.batch import Batch, BatchLoader, BatchPreparer, Transform
from app.data.rows import empty_rows, select_rows
from app.data.sampling import EpochSampler
from app.data.split import dataset_size
from app.data.waiting import ReadTracker, TrackedStream, watch_batches, watch_call
from app.distributed.collectives import is_distributed, local_slice
from app.runtime.errors import UserError
from app.runtime.nested import count_samples, map_tensors, slice_batch
from app.runtime.seed import derive_seed, seed_cpu

log = logging.getLogger(__name__)
Index = slice | Tensor  # of the samples of a batch
BLOCK_BYTES = 2**20  # of batches that are prepared at once
MAX_BLOCK_BATCHES = 64
EPOCHS_BEFORE_KEPT = 3
MAX_PREPARED_BYTES = 256 * 2**20  # of all samples of a dataset


def make_loader(
    data: Dataset[Any] | DataLoader[Any],
    batch_size: int = 1,
    shuffle: bool = False,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    transform: Transform | None = None,
    seed: int = 0,
) -> BatchLoader:
    """Make a loader for a `Trainer` that is built in Python.

    Args:
        data: A dataset of any kind, or a `DataLoader`, which keeps its own batches and order.
        batch_size: Samples per batch; the last batch may be smaller.
        shuffle: Whether to shuffle in each epoch; the order depends only on (seed, epoch).
        device: Target device of batches.
        transform: Applied to the inputs of a batch, on the device.
        seed: Seed of the order, and of random transforms in the dataset.
    """
    prepare = BatchPreparer(device, transform)
    if isinstance(data, DataLoader):
        return ExternalLoader(data, prepare)
    if isinstance(data, IterableDataset):
        return IterableLoader(data, batch_size, prepare, None, seed, DataLoaderOptions())
    sampler = EpochSampler.from_limit(
        dataset_size(data), batch_size, None, seed if shuffle else None
    )
    if isinstance(data, TensorDataset):
        return TensorLoader(data, sampler, batch_size, prepare, on_device=True)
    return SampleLoader(data, sampler, batch_size, prepare, seed, DataLoaderOptions())


@dataclass(frozen=True)
class DataLoaderOptions:
    """Arguments of torch's `DataLoader` for reading samples.

    Attributes:
        num_workers: Worker processes; 0 reads in the main process.
        pin_memory: Whether to pin memory; only used for CUDA devices.
        persistent_workers: Whether to keep the workers from epoch to epoch.
        prefetch_factor: Batches that each worker loads in advance.
        timeout: Seconds without a sample after which reading fails.
    """

    num_workers: int = 0
    pin_memory: bool = True
    persistent_workers: bool = False
    prefetch_factor: int | None = None
    timeout: float = 1800.0

    def arguments(self, device: torch.device, seed: int) -> dict[str, Any]:
        """Return the keyword arguments of a `DataLoader` whose batches go to that device."""
        return {
            "num_workers": self.num_workers,
            "pin_memory": self.pin_memory and device.type == "cuda",
            "persistent_workers": self.persistent_workers and self.num_workers > 0,
            "prefetch_factor": self.prefetch_factor if self.num_workers > 0 else None,
            "generator": torch.Generator().manual_seed(derive_seed(seed, "workers")),
        }


class TensorLoader:
    """Loader of a dataset in memory; indexes entire batches, with no Python code per sample.

    Where preparing a sample always gives the same result, several small batches are prepared at
    once, and each batch is a view of its part. After `EPOCHS_BEFORE_KEPT` epochs, bytes that become
    floats are prepared once for all epochs that follow, if the result has at most
    `MAX_PREPARED_BYTES`. To get that memory and to fill it takes as long as preparing all batches
    of about three epochs, so shorter trainings would only lose.

    Args:
        dataset: Tensors of N samples; a batch is a tuple with as many tensors.
        sampler: Order of the samples.
        batch_size: Samples per batch; the last batch may be smaller.
        prepare: Applied to each batch.
        on_device: Whether to move the entire dataset to the device now, and to keep it prepared.
        rows: Row of each sample in the tensors, shape (N,); None if it is the index of the sample.
    """

    def __init__(
        self,
        dataset: TensorDataset,
        sampler: EpochSampler,
        batch_size: int,
        prepare: BatchPreparer,
        on_device: bool,
        rows: Tensor | None = None,
    ) -> None:
        tensors: Sequence[Tensor] = dataset.tensors
        if on_device and prepare.device.type != "cpu" and rows is not None:
            tensors, rows = [select_rows(tensor, rows) for tensor in tensors], None
        self.tensors = [t.to(prepare.device) if on_device else t for t in tensors]
        self.rows, self.on_device = rows, on_device
        self.sampler, self.batch_size, self.prepare = sampler, batch_size, prepare
        self.num_samples = sampler.num_samples
        self.num_batches = -(-sampler.num_samples // batch_size)
        self.keeps_prepared = on_device and prepare.is_deterministic
        self.prepared: list[Tensor] | None = None  # of all samples, by index
        self.num_prepared = 0  # samples, over all epochs

    def epoch(self, epoch: int) -> Iterator[Batch]:
        if self.prepare.device.type == "cuda" and not self.on_device:
            parts = (self._read_batch(index) for index in self._local_indices(epoch))
            yield from self.prepare.stream(parts)
            return
        enough = EPOCHS_BEFORE_KEPT * self.sampler.dataset_size
        if self.keeps_prepared and self.num_prepared >= enough:
            self.prepared, self.keeps_prepared = self._prepare_all(), False
        indices: Iterator[Index] = self._local_indices(epoch)
        batches_at_once = 1
        while block := [*islice(indices, batches_at_once)]:
            batches = self._read_batches(block)
            yield from batches
            if batches_at_once == 1 and self.prepare.is_deterministic:
                batches_at_once = _batches_in_block(batches[0])

    def _read_batch(self, index: Index) -> tuple[Tensor, ...] | None:
        return self._read(index) if _num_indices(index) else None

    def _read_batches(self, indices: Sequence[Index]) -> list[Batch]:
        """Return the batches of some indices; None for those without samples."""
        sizes = [_num_indices(index) for index in indices]
        if not any(sizes):
            return [None for _ in sizes]
        self.num_prepared += sum(sizes)
        block = self._read_prepared(
            indices[0] if len(indices) == 1 else _join(indices, self.tensors[0].device)
        )
        if len(indices) == 1:
            return [block]
        batches = zip(*(tensor.split(sizes) for tensor in block), strict=True)
        return [batch if size else None for batch, size in zip(batches, sizes, strict=True)]

    def _read_prepared(self, index: Index) -> Batch:
        if self.prepared is None:
            return self.prepare(self._read(index))
        if isinstance(index, slice):
            return tuple(tensor[index].clone() for tensor in self.prepared)
        return tuple(select_rows(tensor, index) for tensor in self.prepared)

    def _prepare_all(self) -> list[Tensor] | None:
        """Return the tensors of all samples, prepared; None if that does not pay or fit."""
        count, sample = self.sampler.dataset_size, self.first(1)
        has_changed = any(t.dtype != s.dtype for t, s in zip(self.tensors, sample, strict=True))
        size = sum(tensor.nbytes for tensor in sample)
        if not has_changed or count * size > MAX_PREPARED_BYTES:
            return None
        prepared = [empty_rows(tensor, count) for tensor in sample]
        rows = max(1, BLOCK_BYTES // size)
        for start in range(0, count, rows):
            part = slice(start, min(count, start + rows))
            for tensor, values in zip(prepared, self.prepare(self._read(part)), strict=True):
                tensor[part].copy_(values)
        return prepared

    def _read(self, index: Index) -> tuple[Tensor, ...]:
        index = index if self.rows is None else self.rows[index]
        if isinstance(index, slice):
            return tuple(tensor[index] for tensor in self.tensors)
        return tuple(select_rows(tensor, index) for tensor in self.tensors)

    def _local_indices(self, epoch: int) -> Iterator[Index]:
        """Yield the indices of this rank's share of each batch."""
        if self.sampler.shuffle_seed is None:
            return self._local_slices()
        indices = self.sampler.indices(epoch).to(self.tensors[0].device)
        return (index[local_slice(len(index))] for index in indices.split(self.batch_size))

    def _local_slices(self) -> Iterator[slice]:
        for start in range(0, self.num_samples, self.batch_size):
            local = local_slice(min(self.batch_size, self.num_samples - start))
            yield slice(start + local.start, start + local.stop)

    def indices(self, epoch: int, step: int) -> Tensor:
        """Return the dataset indices of a global batch; steps are counted from 1."""
        return self.sampler.batch_indices(epoch, step, self.batch_size)

    def first(self, count: int) -> Batch:
        return self.prepare(self._read(slice(count)))


def _batches_in_block(batch: Batch) -> int:
    """Return how many batches like this one to prepare at once."""
    size: int = sum(tensor.nbytes for tensor in batch or ())
    return max(1, min(MAX_BLOCK_BATCHES, BLOCK_BYTES // max(1, size)))


def _num_indices(index: Index) -> int:
    return int(index.stop - index.start) if isinstance(index, slice) else len(index)


def _join(indices: Sequence[Index], device: torch.device) -> Index:
    """Return the indices of several batches as one."""
    parts = []
    for index in indices:
        if isinstance(index, slice):
            parts.append(torch.arange(index.start, index.stop, device=device))
        else:
            parts.append(index)
    return torch.cat(parts)


class SampleLoader:
    """Loader of any map-style dataset, read sample by sample through torch's `DataLoader`.

    Args:
        dataset: Samples of any structure; random transforms in it depend only on (seed, epoch,
            index), whichever process reads the sample.
        sampler: Order of the samples.
        batch_size: Samples per batch; the last batch may be smaller.
        prepare: Applied to each batch.
        seed: Seed of random transforms in the dataset.
        options: Number of workers and how they read.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: EpochSampler,
        batch_size: int,
        prepare: BatchPreparer,
        seed: int,
        options: DataLoaderOptions,
    ) -> None:
        self.batch_sampler, self.prepare = _BatchSampler(sampler, batch_size), prepare
        self.num_samples, self.timeout = sampler.num_samples, options.timeout
        self.tracker = ReadTracker(dataset, options.num_workers)
        self.loader = DataLoader(
            _SeededDataset(dataset, seed, self.tracker),
            batch_sampler=self.batch_sampler,
            collate_fn=_collate,
            **options.arguments(prepare.device, seed),
        )
        self.num_batches = len(self.batch_sampler)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        self.batch_sampler.epoch = epoch
        batches = watch_batches(self.loader, self.timeout, self.tracker)
        return self.prepare.stream(map(_raise_if_error, batches))

    def indices(self, epoch: int, step: int) -> Tensor:
        """Return the dataset indices of a global batch; steps are counted from 1."""
        return self.batch_sampler.sampler.batch_indices(epoch, step, self.batch_sampler.batch_size)

    def first(self, count: int) -> Batch:
        dataset = self.loader.dataset
        keys = [(0, index) for index in range(min(count, self.batch_sampler.sampler.dataset_size))]
        samples = watch_call(lambda: [dataset[key] for key in keys], self.timeout, self.tracker)
        return self.prepare(default_collate(samples))


class _BatchSampler(Sampler[list[tuple[int, int]]]):
    """Yields this rank's (epoch, index) pairs of each batch, which tell workers the epoch."""

    def __init__(self, sampler: EpochSampler, batch_size: int) -> None:
        self.sampler, self.batch_size, self.epoch = sampler, batch_size, 0

    def __len__(self) -> int:
        return -(-self.sampler.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for indices in self.sampler.indices(self.epoch).split(self.batch_size):
            yield [(self.epoch, index) for index in indices[local_slice(len(indices))].tolist()]


class _SeededDataset(Dataset[Any]):
    """Seeds the generators by (seed, epoch, index) while a sample is read."""

    def __init__(self, dataset: Dataset[Any], seed: int, tracker: ReadTracker) -> None:
        self.dataset, self.seed, self.tracker = dataset, seed, tracker

    def __len__(self) -> int:
        return dataset_size(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        # Nothing else draws in a worker, and saving the states costs more than a small image.
        with _preserved_rng_state() if get_worker_info() is None else nullcontext():
            seed_cpu(self.seed, "sample", epoch, index)
            self.tracker.begin(index)
            sample = self._read(index)
            self.tracker.end()
            return sample

    def _read(self, index: int) -> Any:
        """Return the sample, or the error of a worker: a `DataLoader` would raise its traceback."""
        try:
            return self.dataset[index]
        except UserError as error:
            if get_worker_info() is None:
                raise
            return error


def _collate(samples: list[Any]) -> Batch | UserError:
    errors = [sample for sample in samples if isinstance(sample, UserError)]
    if errors:
        return errors[0]
    return default_collate(samples) if samples else None


def _raise_if_error(batch: Batch | UserError) -> Batch:
    if isinstance(batch, UserError):
        raise batch
    return batch


class IterableLoader:
    """Loader of an iterable dataset, which determines the order of its samples.

    Every rank reads the entire dataset, and keeps its share of each batch.

    Args:
        dataset: Samples of any structure. `set_epoch(epoch)` is called at the start of each epoch
            if the dataset has it; without `len` the number of samples is unknown. With several
            workers the dataset must shard itself (`torch.utils.data.get_worker_info`).
        batch_size: Samples per batch; the last batch may be smaller.
        prepare: Applied to each batch.
        limit: Maximum number of batches per epoch, or None.
        seed: Seed of random draws, together with the epoch.
        options: Number of workers and how they read.
        drop_last: Whether to drop an incomplete last batch.
    """

    def __init__(
        self,
        dataset: IterableDataset[Any],
        batch_size: int,
        prepare: BatchPreparer,
        limit: int | None,
        seed: int,
        options: DataLoaderOptions,
        drop_last: bool = False,
    ) -> None:
        if options.persistent_workers and hasattr(dataset, "set_epoch"):
            # Persistent workers keep their copy of the dataset and would not see `set_epoch`.
            options = replace(options, persistent_workers=False)
        if options.num_workers > 1:
            log.warning(
                "each of %d workers reads the entire iterable dataset, unless the dataset shards "
                "itself with torch.utils.data.get_worker_info",
                options.num_workers,
            )
        self.dataset, self.batch_size = dataset, batch_size
        self.prepare, self.limit, self.seed = prepare, limit, seed
        arguments = options.arguments(prepare.device, seed)
        self.generator = arguments["generator"]
        self.tracker, self.timeout = ReadTracker(dataset, options.num_workers), options.timeout
        self.stream = TrackedStream(dataset, self.tracker)
        self.loader = DataLoader(
            self.stream,
            batch_size=batch_size,
            drop_last=drop_last,
            collate_fn=_collate,
            **arguments,
        )
        self.num_samples, self.num_batches = self._lengths(drop_last)

    def _lengths(self, drop_last: bool) -> tuple[int | None, int | None]:
        try:
            total = len(self.dataset)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            return None, self.limit
        total -= total % self.batch_size if drop_last else 0
        num_samples = total if self.limit is None else min(total, self.limit * self.batch_size)
        return num_samples, -(-num_samples // self.batch_size)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        self._start_epoch(epoch)
        batches = iterate_with_shared_rng(self.loader, self.seed, "stream", epoch)
        watched = watch_batches(batches, self.timeout, self.tracker)
        local = (local_batch(_raise_if_error(batch)) for batch in islice(watched, self.limit))
        return self.prepare.stream(local, copies_ahead=self.loader.num_workers > 0)

    def first(self, count: int) -> Batch:
        self._start_epoch(0)
        samples = watch_call(lambda: list(islice(self.stream, count)), self.timeout, self.tracker)
        if not samples:
            raise UserError("the iterable dataset has no samples")
        return self.prepare(default_collate(samples))

    def _start_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(derive_seed(self.seed, "stream", epoch))
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


class ExternalLoader:
    """Adapter of a `DataLoader` made by the user.

    Args:
        loader: Determines batches and their order.
        prepare: Applied to each batch.
    """

    def __init__(self, loader: DataLoader[Any], prepare: BatchPreparer) -> None:
        self.loader, self.prepare = loader, prepare
        try:
            self.num_batches: int | None = len(loader)
        except TypeError:
            self.num_batches = None
        has_size = self.num_batches is not None and not isinstance(loader.dataset, IterableDataset)
        self.num_samples = dataset_size(loader.dataset) if has_size else None

    def epoch(self, epoch: int) -> Iterator[Batch]:
        if hasattr(self.loader.sampler, "set_epoch"):
            self.loader.sampler.set_epoch(epoch)
        batches = map(local_batch, watch_batches(self.loader, DataLoaderOptions().timeout))
        return self.prepare.stream(batches, copies_ahead=self.loader.num_workers > 0)

    def first(self, count: int) -> Batch:
        return map_tensors(lambda tensor: tensor[:count], self.prepare(next(iter(self.loader))))


def local_batch(batch: Batch) -> Batch:
    """Return this rank's share of a batch that every rank has read; None if it is empty."""
    if not is_distributed():
        return batch
    count = count_samples(batch)
    local = local_slice(count)
    return None if local.start == local.stop else slice_batch(batch, local, count)


def iterate_with_shared_rng(loader: DataLoader[Any], *seed: int | str) -> Iterator[Batch]:
    """Yield the batches of a loader whose dataset may draw random numbers in this process.

    With several ranks, these draws are the same on all ranks, and independent of what the ranks
    draw between two batches.
    """
    if not is_distributed():
        yield from loader
        return
    with _preserved_rng_state():
        seed_cpu(*seed)
        batches = iter(loader)  # the dataset may draw its order now
        state = _cpu_rng_state()
    end = object()
    while True:
        with _preserved_rng_state():
            _set_cpu_rng_state(state)
            batch = next(batches, end)
            state = _cpu_rng_state()
        if batch is end:
            return
        yield batch


@contextmanager
def _preserved_rng_state() -> Iterator[None]:
    state = _cpu_rng_state()
    try:
        yield
    finally:
        _set_cpu_rng_state(state)


def _cpu_rng_state() -> tuple[Any, Any, torch.Tensor]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_cpu_rng_state(state: tuple[Any, Any, torch.Tensor]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
