"""Writing in a background thread."""

from __future__ import annotations

import pytest

from app.runtime.background_writer import BackgroundWriter
from app.runtime.errors import UserError


def test_submit_after_failed_write_raises_its_error() -> None:
    writer = BackgroundWriter(in_background=True)

    def fail() -> None:
        raise UserError("the disk is full")

    writer.submit(fail)
    with pytest.raises(UserError, match="the disk is full"):
        writer.submit(lambda: None, wait_first=True)
