"""Progress of work that comes before the training."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 30.0


def show_progress(items: Iterable[T], total: int, name: str, enabled: bool = True) -> Iterator[T]:
    """Yield the items, and show a progress bar on a terminal; elsewhere log a line at intervals.

    Args:
        items: What is worked on.
        total: Number of items.
        name: What is done, at the start of each line.
        enabled: Whether to show anything.
    """
    if enabled and sys.stderr.isatty():
        yield from tqdm(items, name, total, unit_scale=True, leave=False, dynamic_ncols=True)
        return
    start = time.monotonic()
    next_line = start + SECONDS_BETWEEN_LINES
    for count, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if enabled and now >= next_line:
            next_line += SECONDS_BETWEEN_LINES
            rate = count / (now - start)
            left = timedelta(seconds=round((total - count) / rate))
            log.info("%s: %d of %d, %.0f per second, remaining %s", name, count, total, rate, left)
