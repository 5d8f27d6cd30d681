"""The server from which all tests fork processes."""

from __future__ import annotations

from contextlib import chdir
from multiprocessing import forkserver
from pathlib import Path

from app.distributed.launch.local import PRELOAD_MODULES


def start_fork_server() -> None:
    """Start the fork server if it does not run yet; it imports what most processes need.

    It looks for `preload` in its working folder, since another package may be named `tests`, too.
    """
    forkserver.set_forkserver_preload([*PRELOAD_MODULES, "preload"])
    with chdir(Path(__file__).parent):
        forkserver.ensure_running()
