"""Commands in processes forked from one that has torch already, so that they start in no time.

They are processes of their own with their own files, environment and signals; only Python and the
libraries have been imported before.
"""

from __future__ import annotations

import atexit
import multiprocessing as mp
import os
import signal
import sys
from pathlib import Path

from app.launch.local import PRELOADED


def run_warm(cwd: Path, words: list[str], environment: dict[str, str], out: Path, err: Path) -> int:
    """`python -m app` with those words; gives its exit code."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_work, args=(cwd, words, environment, out, err))
    process.start()
    process.join(280)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"app {' '.join(words)}: {out.read_text()}{err.read_text()}")
    assert process.exitcode is not None
    return process.exitcode


def _work(cwd: Path, words: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    for name in ("SIGTERM", "SIGUSR1", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    mp.set_start_method(mp.get_all_start_methods()[0], force=True)  # as in any other process
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = ["app", *words]
    sys.path[:0] = [str(cwd), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    if "OMP_NUM_THREADS" in environment:
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    from app.cli import main

    try:
        main()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
