"""A forkserver for a command that was itself forked: torch is imported already there, too.

It is a child of the command, forked before that has done anything, and waits until the command
starts its forkserver: then it becomes that, by the same words and with the same files as a new
Python would. What is never asked for ends with the command.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from multiprocessing import util
from typing import NoReturn

ABOVE = 200  # no process here has so many files open
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def lend_forkserver() -> None:
    """This process' first forkserver need not import anything; later ones are like any other."""
    mine, its = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        _wait(its)
    its.close()
    start_new = util.spawnv_passfds

    def spawn(path: bytes, words: Sequence[str], files: Sequence[int]) -> int:
        code = str(words[-1])
        if mine.fileno() < 0 or "multiprocessing.forkserver" not in code:
            return start_new(path, words, files)
        socket.send_fds(mine, [json.dumps([code, list(files)]).encode()], list(files))
        mine.close()
        return pid

    util.spawnv_passfds = spawn


def _wait(control: socket.socket) -> NoReturn:
    try:
        for number in SIGNALS:  # nobody is there yet
            signal.signal(number, signal.SIG_IGN)
        os.closerange(3, control.fileno())
        os.closerange(control.fileno() + 1, 1024)
        said, files, _, _ = socket.recv_fds(control, 1 << 16, 8)
        control.close()
        if said:
            code, numbers = json.loads(said)
            _put(files, numbers)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            sys.modules.pop(
                "app.distributed.launch.preload"
            )  # what it does at import is not done here yet
            exec(code)
    finally:
        os._exit(0)


def _put(files: Sequence[int], numbers: Sequence[int]) -> None:
    """The files under the numbers by which they are asked for."""
    high = [fcntl.fcntl(file, fcntl.F_DUPFD, ABOVE) for file in files]
    for file in files:
        os.close(file)
    for file, number in zip(high, numbers, strict=True):
        os.dup2(file, number)
        os.close(file)
