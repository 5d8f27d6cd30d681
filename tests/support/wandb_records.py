"""Read what an offline run of Weights & Biases has written."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_wandb_records(folder: Path) -> Iterator[Any]:
    """Yield the records of an offline run, which are in the log format of LevelDB."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    content, offset, record = path.read_bytes(), 7, b""
    while offset < len(content):
        if 2**15 - offset % 2**15 < 7:  # the rest of the block is too short for a header
            offset += 2**15 - offset % 2**15
            continue
        _, length, kind = struct.unpack("<IHB", content[offset : offset + 7])
        record += content[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # complete record, or last part of one
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def wandb_rows(records: list[Any]) -> list[dict[str, Any]]:
    """Return the values of each call of `log`."""
    return [
        {
            item.key or item.nested_key[0]: json.loads(item.value_json)
            for item in record.history.item
        }
        for record in records
        if record.history.item
    ]
