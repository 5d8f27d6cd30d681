"""Errors for users."""

from __future__ import annotations

import pytest

from app.runtime.errors import ConfigError, as_user_error


def test_as_user_error_converts_only_errors_of_named_files() -> None:
    with pytest.raises(OSError, match="of the program"), as_user_error():
        raise OSError("of the program")
    with (
        pytest.raises(ConfigError, match="ckpt: it cannot be read: damaged"),
        as_user_error("ckpt"),
    ):
        raise OSError("damaged")
