"""Files that are written one after the other, where wanted while the program goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWriter:
    """Writes files.

    Args:
        in_background: A thread does it, a file at a time; what it is given must not change.
    """

    def __init__(self, in_background: bool = False) -> None:
        self.in_background = in_background
        self.thread = ThreadPoolExecutor(1, "writer") if in_background else None
        self.pending: list[Future[None]] = []

    def submit(self, task: Callable[[], None], wait_first: bool = False) -> None:
        """Does it now, or as soon as what came before is done.

        Args:
            task: Writes a file.
            wait_first: It waits for what came before, so that there are never two of its size.

        Raises:
            StorageError: This, or what came before it in the background, cannot be written.
        """
        if self.thread is None:
            task()
            return
        if wait_first:
            self.wait()
        self.pending.append(self.thread.submit(task))

    def wait(self) -> None:
        """Until all is written.

        Raises:
            StorageError: Something cannot be.
        """
        waiting, self.pending = self.pending, []
        for future in waiting:
            future.result()
