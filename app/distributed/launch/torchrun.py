"""Launch jobs on ranks that torchrun or srun has started.

Only rank 0 runs Hydra. It sends each job to the other ranks through a `TCPStore`.
"""

from __future__ import annotations

import json
import logging
import math
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
from app.distributed.launch.worker import SHUTDOWN_GRACE_SECONDS, RankFunction, run_rank
from app.runtime.errors import UserError
from app.runtime.signals import StopSignal, TrainingInterrupted

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

log = logging.getLogger(__name__)
log.setLevel(logging.DEBUG)
JOB_KEY, SEEN_KEY, FAILED_KEY = "job", "seen", "failed"  # keys of the store
END_PREFIX = "end"  # value of a job key after the last job, followed by the exit code
CONNECT_TIMEOUT = timedelta(minutes=10)  # for the last rank to connect
REPORT_SECONDS = 3.0  # time for other ranks to report a failure, and for a query of the store
POLL_SECONDS = 0.05


class RankZero:
    """Rank 0, which sends each job to the other ranks and finally the exit code."""

    def __init__(self, cluster: ClusterEnvironment) -> None:
        self.cluster, self.num_jobs = cluster, 0
        self.store: Store | None = None

    def launch(self, function: RankFunction, job: Job, folder: Path) -> float | None:
        """Run a job on all ranks; return the result of the function on this rank.

        Raises:
            RankFailedError: Another rank failed first.
        """
        self.store = self.store or connect_store(self.cluster)
        self.num_jobs += 1
        self.store.set(f"{JOB_KEY}{self.num_jobs}", job_to_json(job, folder))
        return run_on_rank(function, self.cluster, self.store, self.num_jobs, job, folder)

    def finish(self, exit_code: int) -> None:
        """Tell the other ranks to exit with this code."""
        if self.cluster.world_size == 1:
            return
        self.store = self.store or connect_store(self.cluster)
        self.store.set(f"{JOB_KEY}{self.num_jobs + 1}", f"{END_PREFIX}{exit_code}")
        if not self.cluster.hosts_store:
            return
        store, num_others = self.store, self.cluster.world_size - 1  # the store ends with this rank
        _wait_until(lambda: int(store.add(SEEN_KEY, 0)) == num_others, REPORT_SECONDS)


def follow_rank_zero(function: RankFunction, cluster: ClusterEnvironment) -> int:
    """Run the jobs that rank 0 sends, on any other rank; return the exit code that it sends."""
    store, job_number = connect_store(cluster), 0
    while True:
        job_number += 1
        key = f"{JOB_KEY}{job_number}"
        _wait_until(lambda: store.check([key]))  # noqa: B023 - signal handlers can run meanwhile
        text = store.get(key).decode()
        if text.startswith(END_PREFIX):
            store.add(SEEN_KEY, 1)
            return int(text.removeprefix(END_PREFIX))
        run_on_rank(function, cluster, store, job_number, *job_from_json(text))


def connect_store(cluster: ClusterEnvironment) -> Store:
    """Connect to the store through which ranks find each other; rank 0 may host it.

    Raises:
        UserError: The store cannot be reached, or rank 0 cannot open its port.
    """
    from torch._C._distributed_c10d import TCPStore

    try:
        return TCPStore(
            cluster.master_address,
            cluster.master_port,
            cluster.world_size,
            is_master=cluster.hosts_store and cluster.rank == 0,
            timeout=CONNECT_TIMEOUT,
            wait_for_workers=False,
        )
    except RuntimeError as error:
        address = f"{cluster.master_address}:{cluster.master_port}"
        raise UserError(
            f"launch={cluster.launcher}: the ranks cannot connect at {address} "
            f"({str(error).splitlines()[0]}); set MASTER_ADDR and MASTER_PORT to another address"
        ) from error


def run_on_rank(
    function: RankFunction,
    cluster: ClusterEnvironment,
    store: Store,
    job_number: int,
    job: Job,
    folder: Path,
) -> float | None:
    """Run a job on this rank; if it fails, raise the failure that caused the others."""
    stop = StopSignal(handles_second_interrupt=False)
    with stop.installed():
        try:
            return run_rank(function, cluster, job, folder, store, stop, job_number)
        except BaseException as raised:
            error = root_exception(raised)
            if isinstance(error, TrainingInterrupted):
                if cluster.rank > 0:
                    _wait_for_rank_zero(store, job_number + 1)
                raise
            with stop.deferred_until_step():  # the launcher may already be stopping all ranks
                own_failure = RankFailure.from_exception(cluster.rank, error)
                failure = find_root_failure(cluster, store, job_number, own_failure, job)
                record_rank_failure(folder, failure)
            if failure.rank == cluster.rank:
                raise error from None
            raise failure.to_exception() from error


def find_root_failure(
    cluster: ClusterEnvironment,
    store: Store,
    job_number: int,
    own_failure: RankFailure,
    job: Job,
) -> RankFailure:
    """Report this rank's failure, and return the cause among all failures reported so far."""
    own_rank, failures = own_failure.rank, {own_failure.rank: own_failure}
    own_report = json.dumps(vars(own_failure))
    _query_store(lambda: store.set(f"{FAILED_KEY}{job_number}/{own_rank}", own_report))
    deadline = time.monotonic() + REPORT_SECONDS

    def has_cause() -> bool:
        for rank in range(cluster.world_size):
            if rank not in failures and time.monotonic() < deadline:
                reported = _reported_failure(store, job_number, rank)
                failures.update({} if reported is None else {rank: reported})
        return any(failure.kind not in ("lost", "timeout") for failure in failures.values())

    _wait_until(has_cause, REPORT_SECONDS)
    return root_failure(list(failures.values()), cluster.world_size, job.config.trainer.timeout)


def _reported_failure(store: Store, job_number: int, rank: int) -> RankFailure | None:
    key = f"{FAILED_KEY}{job_number}/{rank}"
    text = _query_store(lambda: store.get(key).decode() if store.check([key]) else None)
    return None if text is None else RankFailure(**json.loads(text))


def _query_store(query: Callable[[], Any]) -> Any:
    """Return the result of a query, or None if the store does not respond in time."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(query())
        except RuntimeError as error:
            log.debug("the store of the ranks cannot be reached", exc_info=error)

    thread = threading.Thread(target=run, daemon=True)  # with a lost network, it blocks for long
    thread.start()
    thread.join(REPORT_SECONDS)
    return results[0] if results else None


def _wait_until(condition: Callable[[], Any], seconds: float = math.inf) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _wait_for_rank_zero(store: Store, job_number: int) -> None:
    """Wait until rank 0 has finished the job: launchers may kill it once another rank has exited.

    Rank 0 may still have to save files and to requeue the job.
    """
    key = f"{JOB_KEY}{job_number}"
    _wait_until(lambda: _query_store(lambda: store.check([key])), SHUTDOWN_GRACE_SECONDS)
    _query_store(lambda: store.add(SEEN_KEY, 1))


def job_to_json(job: Job, folder: Path) -> str:
    """Serialize a job as JSON, so that nobody who can reach the port can make ranks run code."""
    plain = {name: value for name, value in vars(job).items() if name != "config"}
    return json.dumps({"job": plain, "folder": str(folder)})


def job_from_json(text: str) -> tuple[Job, Path]:
    """Return the job and the run folder written by `job_to_json`."""
    content = json.loads(text)
    job = content["job"]
    if job["trusted"] and (cwd := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, cwd)  # as on rank 0
    return Job(reveal_config(job["plain"]), **job), Path(content["folder"])
