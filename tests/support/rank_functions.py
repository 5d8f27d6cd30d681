"""Functions of a test in several processes that talk to each other over gloo."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from app.distributed.launch.local import PRELOADED

TIMEOUT = 60


def in_ranks(size: int, function: Callable[..., Any], *given: Any) -> list[Any]:
    """What the function gives in each rank; a failure of one is raised here."""
    if size == 1:
        return [function(*given)]
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # commands of other tests come from there, too
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(size):
        mine, its = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, size, store.port, its, function, given))
        process.start()
        its.close()
        pipes.append(mine)
        processes.append(process)
    try:
        told = [pickle.loads(pipe.recv_bytes()) for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
    failed = [text for text, _ in told if text]
    assert not failed, "\n".join(failed)
    return [value for _, value in told]


def _rank(
    rank: int, size: int, port: int, pipe: Connection, function: Callable[..., Any], given: Any
) -> None:
    mp.set_start_method(mp.get_all_start_methods()[0], force=True)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(
        "cpu:gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT)
    )
    try:
        told = "", function(*given)
    except BaseException:  # noqa: BLE001 - it is raised again in the test
        told = f"rank {rank}: {traceback.format_exc()}", None
    pipe.send_bytes(pickle.dumps(told))  # tensors by value
    pipe.close()
    if not told[0]:
        dist.destroy_process_group()
