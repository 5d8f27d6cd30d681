"""Run a function on several ranks, which are processes connected by gloo."""

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

from tests.support.fork_server import start_fork_server

TIMEOUT = 60


def run_on_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return the result of a function on each rank; fail if it raises on any of them."""
    if size == 1:
        return [function(*args)]
    context = mp.get_context("forkserver")
    start_fork_server()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(size):
        parent_pipe, child_pipe = context.Pipe(duplex=False)
        process = context.Process(
            target=_run_rank, args=(rank, size, store.port, child_pipe, function, args)
        )
        process.start()
        child_pipe.close()
        pipes.append(parent_pipe)
        processes.append(process)
    try:
        messages = [pickle.loads(pipe.recv_bytes()) for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
    errors = [error for error, _ in messages if error]
    assert not errors, "\n".join(errors)
    return [result for _, result in messages]


def _run_rank(
    rank: int, size: int, port: int, pipe: Connection, function: Callable[..., Any], args: Any
) -> None:
    mp.set_start_method(mp.get_all_start_methods()[0], force=True)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(
        "cpu:gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT)
    )
    try:
        error, result = "", function(*args)
    except BaseException:  # noqa: BLE001 - the test raises it
        error, result = f"rank {rank}: {traceback.format_exc()}", None
    pipe.send_bytes(pickle.dumps((error, result)))  # not `send`, which would share tensor memory
    pipe.close()
    if not error:
        dist.destroy_process_group()
