"""Commands in processes forked from one that has torch already, so that they start in no time.

They are processes of their own with their own files, environment and signals; only Python and the
libraries have been imported before.
"""

from __future__ import annotations

import atexit
import multiprocessing as mp
import os
import runpy
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from app.distributed.launch.local import PRELOADED


class WarmCommand:
    """A command under way, used as a `subprocess.Popen` is; it has a session of its own.

    Args:
        cwd: Where it runs.
        words: What follows `python -m app`.
        environment: Variables beside those of this process.
        err: The file for what it says of errors; None where that goes with the rest.
        module: What Python runs, instead of `app`.
    """

    def __init__(
        self,
        cwd: Path,
        words: Sequence[str],
        environment: Mapping[str, str],
        err: Path | None = None,
        module: str = "app",
    ) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.words, self.told = words, b""
        self.pipe, its = context.Pipe(duplex=False)
        given = (cwd, module, words, {**os.environ, **environment}, its, err)
        self.process = context.Process(target=_work, args=given)
        self.process.start()
        its.close()
        atexit.register(self.kill)  # else multiprocessing would wait for what a failed test leaves
        assert self.process.pid is not None
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        """As of a `subprocess.Popen`: below 0 where a signal has ended it."""
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 280.0) -> tuple[str, None]:
        """All that it has said, once it and whoever else might say something has ended."""
        until = time.monotonic() + timeout
        while not self.pipe.closed:
            if not select.select([self.pipe], [], [], max(0.0, until - time.monotonic()))[0]:
                raise subprocess.TimeoutExpired(self.words, timeout, self.told)
            said = os.read(self.pipe.fileno(), 65536)
            self.told += said
            if not said:
                self.pipe.close()
        self.process.join(max(0.0, until - time.monotonic()))
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.words, timeout, self.told)
        return self.told.decode(), None


def _work(
    cwd: Path,
    module: str,
    words: Sequence[str],
    environment: dict[str, str],
    out: Connection,
    err: Path | None,
) -> None:
    os.setsid()
    _as_by_a_shell(cwd, environment)
    _write_to(out, err)
    sys.argv = [module, *words]
    sys.path[:0] = [str(cwd), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    if "OMP_NUM_THREADS" in environment:
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()


def _as_by_a_shell(cwd: Path, environment: dict[str, str]) -> None:
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    mp.set_start_method(mp.get_all_start_methods()[0], force=True)  # as in any other process
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)


def _write_to(out: Connection, err: Path | None) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out.fileno(), 1)
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT, 0o644) if err else 1, 2)
    out.close()
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
