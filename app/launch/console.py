"""What the terminal shows."""

from __future__ import annotations

import logging
import sys


def errors_to_stderr() -> None:
    """Of the two consoles that the logging configuration makes, each gets its own lines.

    A line that finds no room on a full disk is lost, not a reason for a stack trace.
    """
    logging.raiseExceptions = False
    for handler in logging.getLogger().handlers:
        if getattr(handler, "stream", None) is sys.stdout:
            handler.addFilter(lambda record: record.levelno < logging.ERROR)
