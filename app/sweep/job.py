"""A job of a sweep: its number, its values and its folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from app.config.overrides import JobValues, parse_overrides

MAX_NAME_LENGTH = 80  # without number and hash; file systems allow 255 bytes
# Values that need no parser, which takes milliseconds.
INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]*)")
REAL = re.compile(r"[+-]?(0|[1-9][0-9]*)(\.[0-9]*)?([eE][+-]?[0-9]+)?")
WORD = re.compile(r"(?!(true|false|null|nan|inf)$)[a-z_][a-z0-9_]*", re.IGNORECASE | re.ASCII)


@dataclass
class SweepJob:
    """A job of a sweep.

    Attributes:
        number: Number of the job, counted from 0.
        values: Values of the swept keys, as texts that Hydra can parse.
        folder: Name of the job's folder inside the folder of the sweep.
        failures: How often the job has failed.
        retry_of: In a search, the number of the failed job that this one repeats.
    """

    number: int
    values: JobValues
    folder: str
    failures: int = 0
    retry_of: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the job's entry in `sweep.json`."""
        return asdict(self)

    @property
    def hash(self) -> str:
        """Hash of the values."""
        return values_hash(self.values)


def new_job(number: int, values: JobValues) -> SweepJob:
    """Make a job that has not run yet; its folder is named after its number and values."""
    parts = [f"{number}", short_name(values), values_hash(values)]
    return SweepJob(number, values, "_".join(part for part in parts if part))


def values_hash(values: Mapping[str, str]) -> str:
    """Return a hash of the values that does not depend on their order."""
    return hashlib.sha256(json.dumps(sorted(values.items())).encode()).hexdigest()[:8]


def short_name(values: Mapping[str, str]) -> str:
    """Return a name such as `lr-0.1_model-lenet`.

    The name is safe in a file name, and needs no quotes in `ckpt=...`: Hydra cannot read an
    unquoted value with an equals sign, and a comma would make it a sweep.
    """
    last = [key.rpartition(".")[2].rpartition("/")[2] for key in values]
    names = [name if last.count(name) == 1 else key for name, key in zip(last, values, strict=True)]
    parts = [
        f"{name}-{_shorten_number(text)}" for name, text in zip(names, values.values(), strict=True)
    ]
    name = re.sub(r"[^\w.-]+", "-", "_".join(parts), flags=re.ASCII)
    return name[:MAX_NAME_LENGTH].strip("-_.")


def _shorten_number(text: str) -> str:
    """Round the long numbers that a search draws."""
    try:
        return f"{float(text):.4g}" if len(text) > 7 else text
    except ValueError:
        return text


def parse_value(text: str) -> Any:
    """Parse a value of an override as Hydra does: `1e-3` is a number, `null` is None."""
    for pattern, convert in ((INTEGER, int), (REAL, float), (WORD, str)):
        if pattern.fullmatch(text):
            return convert(text)
    (override,) = parse_overrides([f"value={text}"])
    return override.value()
