"""File permissions that also apply to root."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CAPSET_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3
BYPASS_CAPABILITIES = 0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH: root ignores permissions


@contextmanager
def permissions(path: Path, mode: int) -> Iterator[None]:
    """Change the permissions of a path, and drop root's right to bypass them."""
    if sys.platform != "linux":
        pytest.skip("needs Linux to drop root's capabilities")
    libc, previous_mode = ctypes.CDLL(None), path.stat().st_mode
    header, capabilities = (ctypes.c_uint32 * 2)(CAPSET_VERSION, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, capabilities) == 0
    effective = capabilities[0]
    path.chmod(mode)
    try:
        capabilities[0] = effective & ~BYPASS_CAPABILITIES
        assert libc.capset(header, capabilities) == 0
        yield
    finally:
        capabilities[0] = effective
        assert libc.capset(header, capabilities) == 0
        path.chmod(previous_mode)
