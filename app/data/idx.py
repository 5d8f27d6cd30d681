"""Reader for the IDX file format of MNIST and related datasets."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from app.runtime.errors import UserError

UNSIGNED_BYTE = 8  # type code in the header
MAX_BYTES = 2**30  # uncompressed; the largest dataset in this format has 550 million bytes


def read_idx(path: Path, md5: str | None = None) -> Tensor:
    """Read the array of a gzip-compressed IDX file of unsigned bytes.

    Args:
        path: The `.gz` file.
        md5: Expected MD5 of the uncompressed content; None skips the check.

    Returns:
        uint8 tensor of the shape given in the header.

    Raises:
        UserError: The file is missing, damaged, or not IDX.
    """
    decompressor = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)  # checks the CRC of the content
    try:
        content = decompressor.decompress(path.read_bytes(), MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except zlib.error as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"{path} would expand to more than {MAX_BYTES:,} bytes; refused")
    if not decompressor.eof:
        raise UserError(f"{path} is damaged: it ends too early")
    if md5 is not None:
        _check_md5(path, content, md5)
    return _parse(path, content)


def _check_md5(path: Path, content: bytes, expected: str) -> None:
    actual = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if actual != expected:
        raise UserError(f"{path} is damaged: its content has MD5 {actual}, expected {expected}")


def _parse(path: Path, content: bytes) -> Tensor:
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != UNSIGNED_BYTE:
        raise UserError(f"{path} is not an IDX file of unsigned bytes")
    dimensions = content[3]
    start = 4 + 4 * dimensions
    shape = [int(n) for n in np.frombuffer(content[4:start], ">u4")]
    if len(shape) != dimensions or len(content) - start != int(np.prod(shape, dtype=np.int64)):
        raise UserError(f"{path} is damaged: {len(content)} bytes do not match shape {shape}")
    values = np.frombuffer(content, np.uint8, offset=start).reshape(shape)
    return torch.from_numpy(values.copy())
