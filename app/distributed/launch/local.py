"""Launch jobs on this machine, with one process per device, and watch them until the last exits."""

from __future__ import annotations

import logging
import logging.config
import math
import multiprocessing as mp
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from app.config.schema import Job
from app.distributed.launch.environment import ClusterEnvironment
from app.distributed.launch.failures import (
    RankFailure,
    record_rank_failure,
    root_exception,
    root_failure,
)
from app.distributed.launch.worker import (
    SHUTDOWN_GRACE_SECONDS,
    RankFunction,
    rank_zero_output,
    route_errors_to_stderr,
    run_rank,
    set_num_threads,
)
from app.runtime.escaping import escape_log_records
from app.runtime.signals import (
    REASON_BY_SIGNAL,
    SIGNAL_BY_REASON,
    StopReason,
    StopSignal,
)

log = logging.getLogger(__name__)
log.setLevel(logging.DEBUG)
FAILURE_GRACE_SECONDS = 5.0  # between the first failure of a rank and the end of the others
LOOPBACK = "127.0.0.1"
READY = "ready"  # sent by a rank that handles signals and is connected to the others
PRELOAD_MODULES = [
    "app.distributed.launch.preload",
    "app.cli.main",
    "app.experiment.run",  # by name, as only the fork server may import it
    "app.callbacks.batch_images",
    "app.callbacks.console",
    "app.callbacks.model_summary",
    "app.callbacks.progress",
    "app.callbacks.slowdown",
    "pydantic.type_adapter",
    "torchvision",
    "pandas",
    "tqdm",
]


def launch_local(
    function: RankFunction,
    job: Job,
    folder: Path,
    num_ranks: int,
    logging_config: Mapping[str, Any],
    quiet: bool = False,
) -> float | None:
    """Run a job on several ranks of this machine; see `LocalWorkers` and its method `run`."""
    return LocalWorkers(function, job, folder, num_ranks, logging_config, quiet=quiet).run()


class LocalWorkers:
    """The rank processes of one job.

    Args:
        function: What each rank runs; must be picklable.
        job: The job, the same for all ranks.
        folder: Run folder.
        num_ranks: Number of ranks.
        logging_config: Logging configuration of rank 0, for `logging.config.dictConfig`.
        environment: Additional environment variables of the ranks.
        quiet: Redirect the terminal output of rank 0 to `logs/` too.
    """

    def __init__(
        self,
        function: RankFunction,
        job: Job,
        folder: Path,
        num_ranks: int,
        logging_config: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
        quiet: bool = False,
    ) -> None:
        self.folder, self.num_ranks, self.timeout = folder, num_ranks, job.config.trainer.timeout
        variables = {**os.environ, **(environment or {})}
        self.rank_args = (function, job, folder, variables, dict(logging_config), quiet)
        self.processes: list[BaseProcess] = []
        self.sentinels: dict[int, int] = {}  # ranks of the running processes
        self.pipes: dict[Connection, int] = {}
        self.results: dict[int, float | None] = {}
        self.failures: dict[int, RankFailure] = {}
        self.ready_ranks: list[int] = []
        self.store: object = None  # the port is open as long as this object lives
        self.stop_reason = StopReason.NONE
        self.deadline = math.inf  # on the monotonic clock, for the remaining ranks to end

    def run(self) -> float | None:
        """Start all ranks, wait for them, and return the result of rank 0.

        Raises:
            RankFailedError: A rank failed; all have ended.
            UserError: A rank failed with an error that the user can fix.
            TrainingInterrupted: The job was asked to stop, and all ranks have ended.
        """
        try:
            with StopSignal(forward=self.request_stop).installed():
                self.start()
                while not self.is_finished:
                    self.poll(wait(self.wait_handles, timeout=0.2))
            return self.result()
        except KeyboardInterrupt:
            self.interrupt()
            raise
        finally:
            self.kill()

    def start(self) -> None:
        """Start all ranks without waiting for them."""
        from torch._C._distributed_c10d import TCPStore

        store = TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
        self.store, context = store, _context()
        for rank in range(self.num_ranks):
            cluster = ClusterEnvironment(
                "local", rank, self.num_ranks, rank, self.num_ranks, LOOPBACK, store.port
            )
            parent_pipe, child_pipe = context.Pipe(duplex=False)
            process = context.Process(  # type: ignore[attr-defined]
                target=worker_main, args=(cluster, child_pipe, *self.rank_args), name=f"rank {rank}"
            )
            process.start()
            child_pipe.close()
            self.processes.append(process)
            self.sentinels[process.sentinel] = rank
            self.pipes[parent_pipe] = rank

    @property
    def is_finished(self) -> bool:
        """Whether all ranks have ended, or have had their time to end after the first one."""
        return not self.sentinels or time.monotonic() > self.deadline

    @property
    def wait_handles(self) -> list[Any]:
        """Handles for `multiprocessing.connection.wait`."""
        return [*self.pipes, *self.sentinels]

    def poll(self, ready: Sequence[Any]) -> None:
        """Process the messages and exits of ranks.

        Args:
            ready: Handles of `wait_handles` that are ready.
        """
        for handle in ready:
            if handle in self.sentinels:
                self._on_exit(self.sentinels.pop(handle))
            elif handle in self.pipes:
                self._receive(handle)

    def result(self) -> float | None:
        """Return the result of rank 0, or raise the failure that caused the others."""
        failure = self.failure
        if failure is None:
            return self.results[0]
        self.kill()
        record_rank_failure(self.folder, failure)
        log.debug("rank %d: %s\n%s", failure.rank, failure.error, failure.trace)
        raise failure.to_exception()

    @property
    def failure(self) -> RankFailure | None:
        """The failure that caused the others; None if there is none."""
        failures = list(self.failures.values())
        if not failures:
            return None
        errors = [failure for failure in failures if failure.kind in ("error", "user")]
        if errors:  # e.g. rank 0 could not save its checkpoint: not a clean stop
            return root_failure(errors, self.num_ranks, self.timeout)
        root = root_failure(failures, self.num_ranks, self.timeout)
        stopped = next((failure for failure in failures if failure.kind == "stopped"), None)
        if self.stop_reason and (stopped or root.kind == "died"):
            return stopped or RankFailure(root.rank, "stopped", root.error, reason=self.stop_reason)
        return root

    def request_stop(self, reason: StopReason) -> None:
        """Send a signal to all ranks that handle signals, and to the others once they do."""
        self.stop_reason = max(self.stop_reason, reason)
        for rank in self.ready_ranks:
            self._signal_rank(rank)

    def interrupt(self) -> None:
        """Kill all ranks, and record that the run was interrupted without saving."""
        self.kill()
        record_rank_failure(self.folder, RankFailure(0, "interrupted", "KeyboardInterrupt"))

    def kill(self) -> None:
        """Kill all ranks and their child processes."""
        for process in self.processes:
            if process.pid is not None:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                if process.is_alive():
                    process.kill()
        for rank in self.sentinels.values():
            self._on_exit(rank)
        for pipe in self.pipes:
            pipe.close()
        self.sentinels, self.pipes, self.store = {}, {}, None

    def _receive(self, pipe: Connection) -> None:
        rank = self.pipes[pipe]
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            del self.pipes[pipe]
            return
        if isinstance(message, RankFailure):
            self._add_failure(rank, message)
        elif message == READY:
            self.ready_ranks.append(rank)
            self._signal_rank(rank)  # a signal that came before the rank was ready
        else:
            self.results[rank] = message
            if rank == 0:
                self._end_within(SHUTDOWN_GRACE_SECONDS)

    def _on_exit(self, rank: int) -> None:
        """Read the last messages of a rank that has ended; without a result, it has failed."""
        for pipe in [pipe for pipe, number in self.pipes.items() if number == rank]:
            while pipe in self.pipes and pipe.poll():
                self._receive(pipe)
        process = self.processes[rank]
        process.join()
        if rank not in self.results and rank not in self.failures:
            self._add_failure(rank, RankFailure.from_exit_code(rank, process.exitcode))

    def _add_failure(self, rank: int, failure: RankFailure) -> None:
        self.failures.setdefault(rank, failure)
        is_stop = failure.kind == "stopped"
        self._end_within(SHUTDOWN_GRACE_SECONDS if is_stop else FAILURE_GRACE_SECONDS)

    def _end_within(self, seconds: float) -> None:
        self.deadline = min(self.deadline, time.monotonic() + seconds)

    def _signal_rank(self, rank: int) -> None:
        process = self.processes[rank]
        if self.stop_reason and process.pid is not None and process.is_alive():
            os.kill(process.pid, SIGNAL_BY_REASON[self.stop_reason])


def _context() -> BaseContext:
    """Return a fork server that has imported torch, so that ranks start quickly, where possible."""
    if "forkserver" not in mp.get_all_start_methods() or sys.platform == "darwin":
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD_MODULES)
    return context


def start_forkserver() -> None:
    """Start the fork server, which imports torch while this process continues."""
    if isinstance(_context(), mp.context.ForkServerContext):
        forkserver.ensure_running()


def worker_main(
    cluster: ClusterEnvironment,
    pipe: Connection,
    function: RankFunction,
    job: Job,
    folder: Path,
    environment: dict[str, str],
    logging_config: dict[str, Any],
    quiet: bool,
) -> None:
    """Run the process of one rank; send the result or the failure through the pipe."""
    os.setpgid(0, 0)  # only the parent sends signals, and killing the group ends data workers too
    threading.Thread(target=_die_with_parent, daemon=True).start()
    # Data workers start with the platform's default method, not with that of this process.
    mp.set_start_method(mp.get_all_start_methods()[0], force=True)
    os.environ.clear()
    os.environ.update(environment)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    for name in REASON_BY_SIGNAL:
        signal.signal(getattr(signal, name), signal.SIG_DFL)  # the fork server ignores them
    stop, exit_code = StopSignal(handles_second_interrupt=False), 1

    def run_when_ready(*args: Any) -> float | None:
        pipe.send(READY)
        return function(*args)

    with stop.installed():
        try:
            is_redirected = quiet and cluster.rank == 0
            with rank_zero_output(folder) if is_redirected else nullcontext():
                pipe.send(_run(run_when_ready, cluster, job, folder, stop, logging_config))
            exit_code = 0
        except BaseException as error:  # noqa: BLE001 - the parent raises it
            pipe.send(RankFailure.from_exception(cluster.rank, root_exception(error)))
    pipe.close()
    logging.shutdown()
    if exit_code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)  # skip cleanup, which could hang in a broken process group


def _run(
    function: RankFunction,
    cluster: ClusterEnvironment,
    job: Job,
    folder: Path,
    stop: StopSignal,
    logging_config: dict[str, Any],
) -> float | None:
    from torch._C._distributed_c10d import TCPStore

    escape_log_records()
    set_num_threads(cluster.local_world_size)
    if cluster.rank == 0:
        logging.config.dictConfig(logging_config)
        route_errors_to_stderr()
        logging.captureWarnings(True)
    store = TCPStore(cluster.master_address, cluster.master_port, is_master=False)
    return run_rank(function, cluster, job, folder, store, stop)


def _die_with_parent() -> None:
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)
