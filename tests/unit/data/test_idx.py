"""The reader of IDX files."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest

from app.data.idx import read_idx
from app.runtime.errors import UserError


def test_read_idx_refuses_content_shorter_than_header_declares(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 5) + b"abc"))
    with pytest.raises(UserError, match="do not match shape"):
        read_idx(path)


def test_read_idx_with_damaged_content_is_refused_by_its_checksum(tmp_path: Path) -> None:
    path, header = tmp_path / "a.gz", b"\0\0\x08\x01" + struct.pack(">I", 1000)
    content = bytearray(gzip.compress(header + bytes(range(250)) * 4, 0))  # stored as it is
    content[500] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.gz is damaged: .*incorrect data check"):
        read_idx(path)
