"""Ranks that torchrun or srun has started: rank 0 alone talks to Hydra, and tells the others."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.config.schema import Job
from app.config.secrets import reveal_config
from app.distributed.launch.environment import ClusterEnvironment
from app.distributed.launch.failures import (
    RankFailure,
    record_rank_failure,
    root_exception,
    root_failure,
)
from app.distributed.launch.worker import RankFunction, run_rank
from app.runtime.errors import UserError
from app.runtime.signals import StopSignal, TrainingInterrupted

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

log = logging.getLogger(__name__)
log.setLevel(logging.DEBUG)
JOB, END, SEEN, FAILED = "job", "end", "seen", "failed"
CONNECT_TIMEOUT = timedelta(minutes=10)  # until the last rank has come
SHUTDOWN_GRACE_SECONDS = 60.0  # seconds that rank 0 has when all others have stopped
FAILURE_GRACE_SECONDS = 3.0  # seconds in which the cause of a lost connection becomes known


class RankZero:
    """Rank 0: tells the others each job, and in the end to leave.

    Args:
        world: All of them.
    """

    def __init__(self, world: ClusterEnvironment) -> None:
        self.world, self.jobs = world, 0
        self.store: Store | None = None

    def launch(self, function: RankFunction, job: Job, folder: Path) -> float | None:
        """Runs a job on all ranks; gives what the function gives.

        Raises:
            RankFailed: Another rank failed first.
        """
        self.store = self.store or connect_store(self.world)
        self.jobs += 1
        self.store.set(f"{JOB}{self.jobs}", to_json(job, folder))
        return run_on_rank(function, self.world, self.store, self.jobs, job, folder)

    def finish(self, code: int) -> None:
        """No further job comes: the others end with that code."""
        if self.world.size == 1:
            return
        self.store = self.store or connect_store(self.world)
        self.store.set(f"{JOB}{self.jobs + 1}", f"{END}{code}")
        until = time.monotonic() + FAILURE_GRACE_SECONDS
        while (
            self.world.hosts_store and time.monotonic() < until
        ):  # the store goes with this process
            if int(self.store.add(SEEN, 0)) == self.world.size - 1:
                break
            time.sleep(0.05)


def follow_rank_zero(function: RankFunction, world: ClusterEnvironment) -> int:
    """Any other rank: runs what rank 0 tells, until it is told to leave; gives the exit code."""
    store, number = connect_store(world), 0
    while True:
        number += 1
        text = _wait_for(store, f"{JOB}{number}")
        if text.startswith(END):
            store.add(SEEN, 1)
            return int(text.removeprefix(END))
        run_on_rank(function, world, store, number, *from_json(text))


def connect_store(world: ClusterEnvironment) -> Store:
    """Where ranks find each other.

    Raises:
        UserError: Rank 0 cannot open the port.
    """
    from torch._C._distributed_c10d import TCPStore

    try:
        return TCPStore(
            world.address,
            world.port,
            world.size,
            is_master=world.hosts_store and world.rank == 0,
            timeout=CONNECT_TIMEOUT,
            wait_for_workers=False,
        )
    except RuntimeError as error:
        raise UserError(
            f"launch={world.launcher}: the ranks cannot meet at {world.address}:{world.port} "
            f"({str(error).splitlines()[0]}); MASTER_ADDR and MASTER_PORT name another place"
        ) from error


def run_on_rank(
    function: RankFunction,
    world: ClusterEnvironment,
    store: Store,
    number: int,
    job: Job,
    folder: Path,
) -> float | None:
    """This rank's part of a job; when it fails, the first to fail is known to all."""
    stop = StopSignal(insists=False)
    with stop.installed():
        try:
            return run_rank(function, world, job, folder, store, stop, number)
        except BaseException as raised:
            error = root_exception(raised)
            if isinstance(error, TrainingInterrupted):
                if world.rank > 0:
                    _wait_for_rank_zero(store, number + 1)
                raise
            with stop.deferred_until_step():  # whoever started the ranks may already be ending them
                failure = first_failure(
                    world, store, number, RankFailure.from_exception(world.rank, error), job
                )
                record_rank_failure(folder, failure)
            if failure.rank == world.rank:
                raise error from None
            raise failure.to_exception() from error


def first_failure(
    world: ClusterEnvironment, store: Store, number: int, mine: RankFailure, job: Job
) -> RankFailure:
    """The one with which it began, as far as the ranks have told each other."""
    _try(lambda: store.set(f"{FAILED}{number}/{mine.rank}", json.dumps(vars(mine))))
    until = time.monotonic() + FAILURE_GRACE_SECONDS
    while True:
        others = (rank for rank in range(world.size) if rank != mine.rank)
        told = [_reported_failure(store, number, r) for r in others if time.monotonic() < until]
        known = [mine, *(failure for failure in told if failure is not None)]
        follows = all(failure.kind in ("lost", "timeout") for failure in known)
        if not follows or time.monotonic() > until:
            return root_failure(known, world.size, job.config.trainer.timeout)
        time.sleep(0.05)


def _reported_failure(store: Store, number: int, rank: int) -> RankFailure | None:
    key = f"{FAILED}{number}/{rank}"
    text = _try(lambda: store.get(key).decode() if store.check([key]) else None)
    return None if text is None else RankFailure(**json.loads(text))


def _try(ask: Callable[[], Any]) -> Any:
    """None where the store is gone, or silent; the failure at hand is told all the same."""
    told: list[Any] = []

    def hear() -> None:
        try:
            told.append(ask())
        except RuntimeError as error:
            log.debug("the ranks no longer reach each other", exc_info=error)

    asking = threading.Thread(target=hear, daemon=True)  # a lost network is found out only late
    asking.start()
    asking.join(FAILURE_GRACE_SECONDS)
    return told[0] if told else None


def _wait_for(store: Store, key: str) -> str:
    """Looks again and again, so that signals are heard meanwhile."""
    while not store.check([key]):
        time.sleep(0.05)
    text: str = store.get(key).decode()
    return text


def _wait_for_rank_zero(store: Store, number: int) -> None:
    """Rank 0 is still to write and to ask for what it needs; whoever leaves may end it."""
    until = time.monotonic() + SHUTDOWN_GRACE_SECONDS
    while time.monotonic() < until and not _try(lambda: store.check([f"{JOB}{number}"])):
        time.sleep(0.05)
    _try(lambda: store.add(SEEN, 1))


def to_json(job: Job, folder: Path) -> str:
    """A job in plain words: whoever reaches the port can say nothing that would be executed."""
    plain = {name: value for name, value in vars(job).items() if name != "config"}
    return json.dumps({"job": plain, "folder": str(folder)})


def from_json(text: str) -> tuple[Job, Path]:
    """What `as_text` has written."""
    content = json.loads(text)
    job = content["job"]
    if job["trusted"] and (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # as rank 0 has done
    return Job(reveal_config(job["plain"]), **job), Path(content["folder"])
