r"""Show text of any origin on the terminal and in logs without letting it control them.

Names, notes, errors and values of other people's files may contain sequences that move the cursor,
hide text or change its direction. They are shown as `\x1b` or `\u202e` instead.
"""

from __future__ import annotations

import logging
import re
import sys
from typing import Any

# C0 and C1 controls except tab and newline, bidirectional and invisible formatting, separators that
# some programs take for newlines, and halves of characters, which cannot be encoded.
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def escape_control(text: str) -> str:
    r"""Return the text with control characters written as Python does, such as `\x1b`."""
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def escape_strings(node: Any) -> Any:
    """Return nested dicts and lists in which all strings, also keys, are escaped."""
    if isinstance(node, dict):
        return {escape_strings(name): escape_strings(child) for name, child in node.items()}
    if isinstance(node, list):
        return [escape_strings(child) for child in node]
    return escape_control(node) if isinstance(node, str) else node


def print_error(error: object) -> None:
    """Write an error to stderr."""
    sys.stderr.write(f"{escape_control(str(error))}\n")


def escape_log_records() -> None:
    """Escape the messages and tracebacks of all loggers of this process, whatever formats them."""
    logging.setLogRecordFactory(EscapedRecord)


class EscapedRecord(logging.LogRecord):
    """A log record whose texts are escaped; its arguments are not."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.exc_info:  # formatters use this text if it exists
            self.exc_text = escape_control(logging.Formatter().formatException(self.exc_info))

    def getMessage(self) -> str:  # noqa: N802 - the name in logging
        """Return the message with its arguments inserted."""
        return escape_control(super().getMessage())
