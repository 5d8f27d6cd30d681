"""Write files one at a time, optionally in a background thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWriter:
    """Runs file-writing tasks in order.

    Args:
        in_background: Run them in a thread, one at a time. What a task writes must not change
            until `wait` returns.
    """

    def __init__(self, in_background: bool = False) -> None:
        self.in_background = in_background
        self.thread = ThreadPoolExecutor(1, "writer") if in_background else None
        self.pending: list[Future[None]] = []

    def submit(self, task: Callable[[], None], wait_first: bool = False) -> None:
        """Run a task now, or queue it behind the earlier ones.

        Args:
            task: Writes a file.
            wait_first: Wait for the earlier tasks before queueing this one, so that never two
                tasks hold their data in memory.

        Raises:
            StorageError: This file, or an earlier one of the background, cannot be written.
        """
        if self.thread is None:
            task()
            return
        if wait_first:
            self.wait()
        self.pending.append(self.thread.submit(task))

    def wait(self) -> None:
        """Wait until all tasks have finished.

        Raises:
            StorageError: A file cannot be written.
        """
        pending, self.pending = self.pending, []
        for future in pending:
            future.result()
