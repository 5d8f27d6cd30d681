"""Ranks on this machine: a process for each device, watched until the last has ended."""

from __future__ import annotations

import logging
import logging.config
import multiprocessing as mp
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
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
    RankFunction,
    errors_to_stderr,
    redirect_output,
    run_rank,
    set_num_threads,
)
from app.runtime.signals import (
    REASON_BY_SIGNAL,
    SAME_SIGNAL_SECONDS,
    StopReason,
    StopSignal,
    signal_handlers,
)

log = logging.getLogger(__name__)
log.setLevel(logging.DEBUG)
FAILURE_GRACE_SECONDS = 5.0  # seconds that the others have after the first failure
SHUTDOWN_GRACE_SECONDS = 60.0  # seconds that the others have after rank 0 is done
LOOPBACK = "127.0.0.1"
READY = "listens"  # what a rank says once signals reach it
PRELOADED = [
    "app.distributed.launch.preload",
    "app.cli.main",
    "app.experiment.run",  # by name: only the process that ranks are forked from imports it
    "torchvision",
    "pandas",
    "tqdm",
]


def launch_local(
    function: RankFunction,
    job: Job,
    folder: Path,
    size: int,
    logging_config: Mapping[str, Any],
    quiet: bool = False,
) -> float | None:
    """Runs a job on so many ranks.

    Args:
        function: What each rank runs; importable by its name.
        job: The same for all.
        folder: Of the run.
        size: How many ranks.
        logging_config: Of rank 0, as `logging.config.dictConfig` takes it.
        quiet: Rank 0, too, writes to `logs/` what it would show on the terminal.

    Returns:
        What the function gives in rank 0.

    Raises:
        RankFailed: A rank failed; all have ended.
        UserError: The user must put something right.
        Stopped: It was asked to end, and did.
    """
    crew = LocalWorkers(function, job, folder, size, logging_config, quiet=quiet)
    try:
        return crew.run()
    finally:
        crew.kill()


class LocalWorkers:
    """The processes of one job.

    Args:
        function: What each rank runs; importable by its name.
        job: The same for all.
        folder: Of the run.
        size: How many.
        logging_config: Of rank 0.
        environment: Variables of theirs beside those of this process.
        quiet: Rank 0, too, writes to `logs/` what it would show on the terminal.
    """

    def __init__(
        self,
        function: RankFunction,
        job: Job,
        folder: Path,
        size: int,
        logging_config: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
        quiet: bool = False,
    ) -> None:
        self.function, self.job, self.folder, self.size = function, job, folder, size
        self.logging_config, self.quiet = dict(logging_config), quiet
        self.environment = {**os.environ, **(environment or {})}
        self.processes: list[BaseProcess] = []
        self.sentinels: dict[int, int] = {}  # of those that have not ended, and their ranks
        self.pipes: dict[Connection, int] = {}
        self.results: dict[int, float | None] = {}
        self.failures: dict[int, RankFailure] = {}
        self.ready_ranks: list[int] = []
        self.store: object = None  # its port is taken as long as it lives
        self.signals: list[int] = []  # asked to stop by
        self.first_signal_at = self.first_result_at = 0.0

    def run(self) -> float | None:
        """To the end."""
        with signal_handlers(self._on_signal):
            self.start()
            while not self.is_finished:
                self.poll(wait(self.wait_handles, timeout=0.2))
        return self.result()

    @property
    def is_finished(self) -> bool:
        """Whether every rank has ended, or the grace of those that should have is over."""
        return not self.sentinels or self._is_overdue()

    @property
    def wait_handles(self) -> list[Any]:
        """What `multiprocessing.connection.wait` is to wait for."""
        return [*self.pipes, *self.sentinels]

    def poll(self, ready: Sequence[Any]) -> None:
        """Hears what ranks have told, and which have ended."""
        for one in ready:
            if one in self.sentinels:
                self._on_exit(self.sentinels.pop(one))
            elif one in self.pipes:
                self._receive(one)

    def result(self) -> float | None:
        """What the function gave in rank 0; raises the failure with which it began."""
        if not self.failures:
            return self.results[0]
        failure = self._root_failure()
        self.kill()
        record_rank_failure(self.folder, failure)
        error = failure.to_exception()
        log.debug("rank %d: %s\n%s", failure.rank, failure.error, failure.trace)
        raise error

    def start(self) -> None:
        """All ranks, without waiting for them."""
        from torch._C._distributed_c10d import TCPStore

        store = TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
        self.store, context, config = store, _context(), self.logging_config
        for rank in range(self.size):
            world = ClusterEnvironment(
                "local", rank, self.size, rank, self.size, LOOPBACK, store.port
            )
            mine, its = context.Pipe(duplex=False)
            process = context.Process(  # type: ignore[attr-defined]
                target=worker_main,
                args=(
                    self.function,
                    world,
                    self.job,
                    self.folder,
                    its,
                    self.environment,
                    config,
                    self.quiet,
                ),
                name=f"rank {rank}",
            )
            process.start()
            its.close()
            self.processes.append(process)
            self.sentinels[process.sentinel] = rank
            self.pipes[mine] = rank

    def _receive(self, pipe: Connection) -> None:
        rank = self.pipes[pipe]
        try:
            told = pipe.recv()
        except (EOFError, OSError):
            del self.pipes[pipe]
            return
        if isinstance(told, RankFailure):
            self.failures.setdefault(rank, told)
        elif told == READY:
            self.ready_ranks.append(rank)
            self._signal_rank(rank)  # what came before it could hear
        else:
            self.results[rank] = told
            self.first_result_at = self.first_result_at or time.monotonic()

    def _on_exit(self, rank: int) -> None:
        """A rank has ended; it should have told how."""
        for pipe in [pipe for pipe, number in self.pipes.items() if number == rank]:
            while pipe in self.pipes and pipe.poll():
                self._receive(pipe)
        if rank not in self.results and rank not in self.failures:
            process = self.processes[rank]
            process.join()
            self.failures[rank] = RankFailure.from_exit_code(rank, process.exitcode)

    def _is_overdue(self) -> bool:
        if self.failures:
            told = self.failures.values()
            graces = (
                SHUTDOWN_GRACE_SECONDS if one.kind == "stopped" else FAILURE_GRACE_SECONDS
                for one in told
            )
            ends = (one.when + grace for one, grace in zip(told, graces, strict=True))
            return time.time() > min(ends)
        return (
            0 in self.results and time.monotonic() - self.first_result_at > SHUTDOWN_GRACE_SECONDS
        )

    def _root_failure(self) -> RankFailure:
        failures = list(self.failures.values())
        found = root_failure(failures, self.size, self.job.config.trainer.timeout)
        stopped = next((one for one in failures if one.kind == "stopped"), None)
        broke = [one for one in failures if one.kind in ("error", "user")]
        if broke:  # rank 0 could not save, say; it is no clean end
            return root_failure(broke, self.size, self.job.config.trainer.timeout)
        if self.signals and (stopped or found.kind == "died"):
            reason = max(_reason(number) for number in self.signals)
            return stopped or RankFailure(found.rank, "stopped", found.error, reason=reason)
        return found

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """What this process is told, all ranks are told; they are not in its group."""
        again = (
            number in self.signals and time.monotonic() - self.first_signal_at > SAME_SIGNAL_SECONDS
        )
        if again and number == signal.SIGINT:
            self.kill()
            record_rank_failure(self.folder, RankFailure(0, "interrupted", "KeyboardInterrupt"))
            raise KeyboardInterrupt
        if not self.signals:
            self.first_signal_at = time.monotonic()
            hint = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
            sys.stderr.write(f"\nstopping after this step{hint}\n")
        self.send_signal(number)

    def send_signal(self, number: int) -> None:
        """Asks all ranks to stop, by a signal."""
        self.signals.append(number)
        for rank in self.ready_ranks:
            self._signal_rank(rank)

    def _signal_rank(self, rank: int) -> None:
        process = self.processes[rank]
        if self.signals and process.pid is not None and process.is_alive():
            os.kill(process.pid, self.signals[-1])

    def kill(self) -> None:
        """Ends every rank and what it has started, at once."""
        for process in self.processes:
            if process.pid is not None:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                if process.is_alive():
                    process.kill()
        for process in self.processes:
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.pipes, self.store = {}, None


def _reason(number: int) -> StopReason:
    return REASON_BY_SIGNAL[signal.Signals(number).name]


def _context() -> BaseContext:
    """Where processes can be made from one that has torch already, they start in no time."""
    if "forkserver" not in mp.get_all_start_methods() or sys.platform == "darwin":
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def start_forkserver() -> None:
    """Begins the process that ranks are made from; it imports torch while this one goes on."""
    if isinstance(_context(), mp.context.ForkServerContext):
        forkserver.ensure_running()


def worker_main(
    function: RankFunction,
    world: ClusterEnvironment,
    job: Job,
    folder: Path,
    pipe: Connection,
    environment: dict[str, str],
    logging_config: dict[str, Any],
    quiet: bool,
) -> None:
    """The process of one rank."""
    os.setpgid(0, 0)  # signals come from the parent alone, and the end comes to its workers, too
    threading.Thread(target=_die_with_parent, daemon=True).start()
    mp.set_start_method(mp.get_all_start_methods()[0], force=True)  # as anywhere else: for readers
    os.environ.clear()
    os.environ.update(environment)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    for name in REASON_BY_SIGNAL:
        signal.signal(getattr(signal, name), signal.SIG_DFL)  # not as where it was forked from
    stop, code = StopSignal(insists=False), 1
    with stop.installed():
        try:
            pipe.send(READY)
            with _printed(folder) if quiet and world.rank == 0 else nullcontext():
                pipe.send(_run(function, world, job, folder, stop, logging_config))
            code = 0
        except BaseException as error:  # noqa: BLE001 - the parent raises it
            pipe.send(RankFailure.from_exception(world.rank, root_exception(error)))
    pipe.close()
    logging.shutdown()
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the others have the word; nothing may hold it up


def _printed(folder: Path) -> AbstractContextManager[None]:
    return redirect_output(folder / "logs" / "rank0.log")


def _run(
    function: RankFunction,
    world: ClusterEnvironment,
    job: Job,
    folder: Path,
    stop: StopSignal,
    logging_config: dict[str, Any],
) -> float | None:
    from torch._C._distributed_c10d import TCPStore

    set_num_threads(world.local_size)
    if world.rank == 0:
        logging.config.dictConfig(logging_config)
        errors_to_stderr()
        logging.captureWarnings(True)
    store = TCPStore(world.address, world.port, is_master=False)
    return run_rank(function, world, job, folder, store, stop)


def _die_with_parent() -> None:
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)
