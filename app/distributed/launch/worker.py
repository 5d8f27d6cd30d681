"""What every rank does around a job: find the others, keep a log, leave nothing behind."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from app.config.schema import Job
from app.distributed.launch.environment import ClusterEnvironment
from app.runtime.errors import UserError
from app.runtime.signals import StopSignal

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

log = logging.getLogger(__name__)
log.setLevel(logging.DEBUG)  # where errors came from is for the files alone
MARKED = "rank %d: %%(message)s"
# What a launcher runs on each rank: job, run folder, stop request, local rank -> goal value.
RankFunction = Callable[[Job, Path, StopSignal, int], float | None]
DATED = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


def run_rank(
    function: RankFunction,
    world: ClusterEnvironment,
    job: Job,
    folder: Path,
    store: Store,
    stop: StopSignal,
    number: int = 0,
) -> float | None:
    """This rank's part of a job.

    Args:
        function: What to run.
        world: Which rank it is, and of how many.
        job: The same for all.
        folder: Of the run.
        store: In which ranks find each other.
        stop: Who asks to end before the plan is over.
        number: Of the job, among those of this store.

    Returns:
        What the function gives.
    """
    with ExitStack() as stack:
        if world.rank > 0:
            stack.enter_context(rank_logging(world.rank, folder))
        if world.size > 1:
            stack.enter_context(process_group(world, store, number, job.config.trainer.timeout))
        try:
            return function(job, folder, stop, world.local_rank)
        except BaseException as error:
            log.debug("rank %d ends with", world.rank, exc_info=error)
            raise


@contextmanager
def process_group(
    world: ClusterEnvironment, store: Store, number: int, timeout: float
) -> Iterator[None]:
    """All ranks know each other: tensors of the host go over gloo, of CUDA devices over NCCL.

    After an error the process ends, and what is left of the meeting with it.
    """
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore

    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "cpu:gloo",
            store=PrefixStore(f"job{number}", store),
            rank=world.rank,
            world_size=world.size,
            timeout=timedelta(seconds=timeout),
        )
    except RuntimeError as error:
        if "connectFullMesh" not in str(error):
            raise
        raise UserError(
            "the ranks cannot reach each other; set GLOO_SOCKET_IFNAME to the network interface "
            f"by which they can, as GLOO_SOCKET_IFNAME=eth0 ({error})"
        ) from error
    yield
    dist.destroy_process_group()


@contextmanager
def rank_logging(rank: int, folder: Path) -> Iterator[None]:
    """This rank's log and whatever is printed go to `logs/`; warnings to the console, marked."""
    path = folder / "logs" / f"rank{rank}.log"
    with ExitStack() as stack:
        console = stack.enter_context(os.fdopen(os.dup(sys.stderr.fileno()), "w"))
        stack.enter_context(redirect_output(path))
        file = logging.FileHandler(path)
        file.setFormatter(logging.Formatter(DATED))
        handlers = [file]
        for handler in (logging.StreamHandler(console), logging.FileHandler(folder / "run.log")):
            handler.setLevel(logging.WARNING)
            dated = isinstance(handler, logging.FileHandler)
            words = (DATED if dated else "%(message)s").replace("%(message)s", MARKED % rank)
            handler.setFormatter(logging.Formatter(words))
            handlers.append(handler)  # type: ignore[arg-type]
        root, before = logging.getLogger(), logging.getLogger().handlers
        root.handlers, level = list(handlers), root.level
        root.setLevel(logging.INFO)
        logging.captureWarnings(True)
        try:
            yield
        finally:
            root.handlers = before
            root.setLevel(level)
            for handler in handlers:
                handler.flush()


@contextmanager
def redirect_output(path: Path) -> Iterator[None]:
    """Standard output and errors of this process, whoever writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in zip((1, 2), kept, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)


def set_num_threads(local_size: int) -> None:
    """The cores of this machine, shared out over its ranks, unless `OMP_NUM_THREADS` says else."""
    import torch

    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(1, (cores or 1) // local_size)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def errors_to_stderr() -> None:
    """Of the two consoles that the logging configuration makes, each gets its own lines.

    A line that finds no room on a full disk is lost, not a reason for a stack trace.
    """
    logging.raiseExceptions = False
    for handler in logging.getLogger().handlers:
        if getattr(handler, "stream", None) is sys.stdout:
            handler.addFilter(lambda record: record.levelno < logging.ERROR)
