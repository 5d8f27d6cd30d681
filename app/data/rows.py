"""Work on many rows of large tensors, in threads of which each uses a single core."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier

import numpy as np
import torch
from torch import Tensor

CHUNK_BYTES = 2**20  # that a core works on at once: they fit into its cache


def chunk_size(tensor: Tensor, itemsize: int | None = None) -> int:
    """Return how many rows a core works on at once.

    Args:
        tensor: Its rows are what is worked on.
        itemsize: Bytes of a value that is computed with; None is that of the tensor.
    """
    row_bytes = math.prod(tensor.shape[1:]) * (itemsize or tensor.element_size())
    return max(1, CHUNK_BYTES // max(1, row_bytes))


def for_chunks(function: Callable[..., object], size: int, *tensors: Tensor) -> None:
    """Call a function with `size` rows of each tensor at once, in as many threads as torch uses.

    Neither the chunks nor how each is computed depend on the number of threads.

    Args:
        function: Must not draw random numbers, since chunks are computed in any order.
        size: Rows of a chunk; the last one may be smaller.
        *tensors: Tensors on the CPU with the same number of rows.
    """
    if tensors[0].shape[0] <= size:
        function(*tensors)
        return
    chunks = [tensor.split(size) for tensor in tensors]
    threads = torch.get_num_threads()
    apply = map if threads == 1 else thread_pool(threads).map
    for _ in apply(function, *chunks):
        pass


@lru_cache(maxsize=1)
def thread_pool(threads: int) -> ThreadPoolExecutor:
    """Start threads in which an operation of torch uses one core.

    By default, it would start as many threads of OpenMP again in each of them. Those keep their
    core busy while they wait for one another, which takes many times as long as the work itself
    when another process needs a core, too.
    """
    default, pool, started = torch.get_num_threads(), ThreadPoolExecutor(threads), Barrier(threads)

    def use_one_core(_: int) -> None:
        started.wait()
        torch.get_num_threads()  # otherwise the next operation would set the default
        torch.set_num_threads(1)  # in this thread, and in those that start later

    for _ in pool.map(use_one_core, range(threads)):
        pass
    torch.set_num_threads(default)
    return pool


if hasattr(os, "register_at_fork"):  # a forked process has none of the threads
    os.register_at_fork(after_in_child=thread_pool.cache_clear)


def select_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Return `tensor[index]` in the memory format of the tensor.

    `index_select` copies whole rows, which is several times as fast, but only contiguous ones.
    """
    if has_channels_last(tensor):
        return _select_rows(tensor.permute(0, 2, 3, 1), index).permute(0, 3, 1, 2)
    return _select_rows(tensor, index)


def _select_rows(tensor: Tensor, index: Tensor) -> Tensor:
    if not tensor.is_cpu:
        return tensor.index_select(0, index)
    rows = tensor.new_empty((index.shape[0], *tensor.shape[1:]))

    def select_chunk(rows: Tensor, index: Tensor) -> None:
        torch.index_select(tensor, 0, index, out=rows)

    for_chunks(select_chunk, chunk_size(tensor), rows, index)
    return rows


def has_channels_last(tensor: Tensor) -> bool:
    """Return whether a tensor has the strides of `torch.channels_last`, also with one channel."""
    if tensor.ndim != 4 or (tensor.stride(1), tensor.stride(3)) != (1, tensor.shape[1]):
        return False
    return tensor.is_contiguous(memory_format=torch.channels_last)


def empty_rows(sample: Tensor, count: int) -> Tensor:
    """Return an empty tensor of `count` samples with the strides of this one, (1, ...)."""
    if has_channels_last(sample):
        _, channels, height, width = sample.shape
        return _empty(sample, (count, height, width, channels)).permute(0, 3, 1, 2)
    return _empty(sample, (count, *sample.shape[1:]))


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return an empty tensor in huge pages of memory, where the system has them.

    numpy asks for them. Getting a large tensor page by page takes as long as computing it.
    """
    if not like.is_cpu:
        return like.new_empty(shape)
    memory = np.empty(math.prod(shape) * like.element_size(), np.uint8)
    return torch.from_numpy(memory).view(like.dtype).view(shape)
