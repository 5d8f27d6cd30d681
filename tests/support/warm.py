"""Run commands in processes forked from one that has already imported torch, so they start fast.

Each command is a separate process with its own files, environment and signal handlers; only Python
and the libraries have been loaded before.
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
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from app.distributed.launch import local
from tests.support.fork_server import start_fork_server


class WarmCommand:
    """A running command with the interface of `subprocess.Popen`, in a session of its own.

    Args:
        cwd: Its working directory.
        arguments: What follows `python -m app`.
        environment: Variables to add to those of this process.
        err: File for stderr; None sends stderr to stdout.
        module: The module to run instead of `app`.
    """

    def __init__(
        self,
        cwd: Path,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        err: Path | None = None,
        module: str = "app",
    ) -> None:
        context = mp.get_context("forkserver")
        start_fork_server()
        self.arguments, self.output = arguments, b""
        self.pipe, child_pipe = context.Pipe(duplex=False)
        args = (cwd, module, arguments, {**os.environ, **environment}, child_pipe, err)
        self.process = context.Process(target=_child_main, args=args)
        self.process.start()
        child_pipe.close()
        atexit.register(self.kill)  # at exit, multiprocessing joins processes of failed tests
        assert self.process.pid is not None
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code as in `subprocess.Popen`: negative if a signal ended the process."""
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 280.0) -> tuple[str, None]:
        """Wait for the command and everything that shares its output, and return the output."""
        deadline = time.monotonic() + timeout
        while not self.pipe.closed:
            if not select.select([self.pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise subprocess.TimeoutExpired(self.arguments, timeout, self.output)
            chunk = os.read(self.pipe.fileno(), 65536)
            self.output += chunk
            if not chunk:
                self.pipe.close()
        self.process.join(max(0.0, deadline - time.monotonic()))
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout, self.output)
        return self.output.decode(), None


def _child_main(
    cwd: Path,
    module: str,
    arguments: Sequence[str],
    environment: dict[str, str],
    out: Connection,
    err: Path | None,
) -> None:
    os.setsid()
    _reset_process(cwd, environment)
    _redirect_output(out, err)
    sys.argv = [module, *arguments]
    sys.path[:0] = [str(cwd), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    if "OMP_NUM_THREADS" in environment:
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    # Fork ranks from this process: a forkserver of its own would import torch again for every test.
    # Commands started cold, and ranks launched by the tests themselves, use the real forkserver.
    local._context = partial(mp.get_context, "fork")
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()


def _reset_process(cwd: Path, environment: dict[str, str]) -> None:
    """Restore what a process started from a shell would have."""
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    mp.set_start_method(mp.get_all_start_methods()[0], force=True)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)


def _redirect_output(out: Connection, err: Path | None) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out.fileno(), 1)
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT, 0o644) if err else 1, 2)
    out.close()
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
