"""Set up a rank around a job: process group, logging, output and threads."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from app.config.schema import Job
from app.config.secrets import remember_secrets
from app.distributed.launch.environment import ClusterEnvironment
from app.runtime.errors import UserError
from app.runtime.folders import held_folder, make_folder
from app.runtime.signals import StopSignal

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

log = logging.getLogger(__name__)
log.setLevel(logging.DEBUG)  # stack traces go to the log files only
# What a launcher runs on each rank: job, run folder, stop signal, local rank -> goal value.
RankFunction = Callable[[Job, Path, StopSignal, int], float | None]
FILE_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
SHUTDOWN_GRACE_SECONDS = 60.0  # between the regular end of one rank and that of the others


def run_rank(
    function: RankFunction,
    cluster: ClusterEnvironment,
    job: Job,
    folder: Path,
    store: Store,
    stop: StopSignal,
    job_number: int = 0,
) -> float | None:
    """Run a job on this rank, and return the result of the function.

    Args:
        function: What to run.
        cluster: This rank and all others.
        job: The job, the same for all ranks.
        folder: Run folder.
        store: Store through which ranks connect.
        stop: Requests to stop early.
        job_number: Number of the job among those that use the store.
    """
    remember_secrets(job.plain)
    with ExitStack() as stack:
        with stop.deferred():  # a rank that stops alone leaves the others waiting to connect
            stack.enter_context(held_folder(folder))
            if cluster.rank > 0:
                stack.enter_context(rank_logging(cluster.rank, folder))
            if cluster.world_size > 1:
                timeout = job.config.trainer.timeout
                stack.enter_context(process_group(cluster, store, job_number, timeout))
        try:
            return function(job, folder, stop, cluster.local_rank)
        except BaseException as error:
            log.debug("rank %d ended with an exception", cluster.rank, exc_info=error)
            raise


@contextmanager
def process_group(
    cluster: ClusterEnvironment, store: Store, job_number: int, timeout: float
) -> Iterator[None]:
    """Connect the ranks: CPU tensors use gloo, CUDA tensors use NCCL.

    After an error, the process group is left to the end of the process.

    Args:
        cluster: This rank and all others.
        store: Store through which ranks connect.
        job_number: Number of the job among those that use the store.
        timeout: Seconds that a collective waits for the other ranks.

    Raises:
        UserError: The ranks cannot connect to each other.
    """
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore

    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "cpu:gloo",
            store=PrefixStore(f"job{job_number}", store),
            rank=cluster.rank,
            world_size=cluster.world_size,
            timeout=timedelta(seconds=timeout),
        )
        # A rank that has connected may end, and the store with it, while others still connect.
        dist.all_reduce(torch.zeros(()))
    except RuntimeError as error:
        if "connectFullMesh" not in str(error):
            raise
        raise UserError(
            "the ranks cannot connect to each other; set GLOO_SOCKET_IFNAME to a network interface "
            f"that connects them, for example GLOO_SOCKET_IFNAME=eth0 ({error})"
        ) from error
    yield
    dist.destroy_process_group()


@contextmanager
def rank_logging(rank: int, folder: Path) -> Iterator[None]:
    """Send this rank's log and output to `logs/`, and its warnings to the console and `run.log`."""
    path = folder / "logs" / f"rank{rank}.log"
    with ExitStack() as stack:
        console = stack.enter_context(os.fdopen(os.dup(sys.stderr.fileno()), "w"))
        stack.enter_context(redirect_output(path))
        handlers: list[logging.Handler] = [logging.FileHandler(path)]
        handlers[0].setFormatter(logging.Formatter(FILE_FORMAT))
        warnings_to: list[tuple[logging.Handler, str]] = [
            (logging.StreamHandler(console), "%(message)s"),
            (logging.FileHandler(folder / "run.log"), FILE_FORMAT),
        ]
        for handler, line_format in warnings_to:
            text = line_format.replace("%(message)s", f"rank {rank}: %(message)s")
            handler.setFormatter(logging.Formatter(text))
            handler.setLevel(logging.WARNING)
            handlers.append(handler)
        root = logging.getLogger()
        previous_handlers, previous_level = root.handlers, root.level
        root.handlers = handlers
        root.setLevel(logging.INFO)
        logging.captureWarnings(True)
        try:
            yield
        finally:
            root.handlers = previous_handlers
            root.setLevel(previous_level)
            for handler in handlers:
                handler.flush()


def rank_zero_output(folder: Path) -> AbstractContextManager[None]:
    """Redirect the output of rank 0 to a file, for jobs that do not have the terminal."""
    return redirect_output(folder / "logs" / "rank0.log")


@contextmanager
def redirect_output(path: Path) -> Iterator[None]:
    """Append everything that is written to stdout and stderr, also by C code, to a file."""
    make_folder(path.parent)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in zip((1, 2), saved, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)


def set_num_threads(local_world_size: int) -> None:
    """Divide the cores of this machine among its ranks, unless `OMP_NUM_THREADS` is set."""
    import torch

    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        return
    threads = max(1, num_cores() // local_world_size)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def num_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def route_errors_to_stderr() -> None:
    """Keep errors off stdout, as the logging configuration has a handler for stderr too.

    Log lines that cannot be written, for example on a full disk, are dropped without a stack trace.
    """
    logging.raiseExceptions = False
    for handler in logging.getLogger().handlers:
        if getattr(handler, "stream", None) is sys.stdout:
            handler.addFilter(lambda record: record.levelno < logging.ERROR)
