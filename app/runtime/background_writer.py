"""Files that are written one after the other, where wanted while the program goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Writer:
    """Writes files.

    Args:
        in_background: A thread does it, a file at a time; what it is given must not change.
    """

    def __init__(self, in_background: bool = False) -> None:
        self.in_background = in_background
        self.thread = ThreadPoolExecutor(1, "writer") if in_background else None
        self.under_way: list[Future[None]] = []

    def write(self, task: Callable[[], None], supersedes: bool = False) -> None:
        """Does it now, or as soon as what came before is done.

        Args:
            task: Writes a file.
            supersedes: It waits for what came before, so that there are never two of its size.

        Raises:
            StorageError: This, or what came before it in the background, cannot be written.
        """
        if self.thread is None:
            task()
            return
        if supersedes:
            self.wait()
        self.under_way.append(self.thread.submit(task))

    def wait(self) -> None:
        """Until all is written.

        Raises:
            StorageError: Something cannot be.
        """
        waiting, self.under_way = self.under_way, []
        for future in waiting:
            future.result()
