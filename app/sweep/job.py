"""A job of a sweep: its number, its values, its folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from app.config.overrides import JobValues, parse_overrides

MAX_NAME_LENGTH = 80  # characters of a name beside number and hash; file systems allow 255 bytes


@dataclass
class SweepJob:
    """One of the jobs.

    Attributes:
        number: Its own in the sweep, counted from 0.
        values: By swept key, as they would be typed.
        overrides: Its whole command line, less what is Hydra's own.
        folder: Its name inside the sweep's.
        failures: How often it has failed.
        retry_of: The number of the failed job that it repeats, in a search.
    """

    number: int
    values: JobValues
    overrides: list[str]
    folder: str
    failures: int = 0
    retry_of: int | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> SweepJob:
        """Build a job from its entry in `sweep.json`."""
        fields = dict(content)
        return cls(overrides=fields.pop("words"), **fields)

    def to_json(self) -> dict[str, Any]:
        """Return the job's entry in `sweep.json`."""
        fields = asdict(self)
        return {"words": fields.pop("overrides"), **fields}

    @property
    def hash(self) -> str:
        """Of the values."""
        return values_hash(self.values)


def new_job(number: int, values: JobValues, words: list[str]) -> SweepJob:
    """A job that has not run yet."""
    names = [f"{number}", short_name(values), values_hash(values)]
    return SweepJob(number, values, words, "_".join(name for name in names if name))


def values_hash(values: Mapping[str, str]) -> str:
    """The same for the same values, in whatever order they were typed."""
    return hashlib.sha256(json.dumps(sorted(values.items())).encode()).hexdigest()[:8]


def short_name(values: Mapping[str, str]) -> str:
    """`lr-0.1_model-lenet`: safe in a file name, and in `ckpt=...` without quotes.

    Hydra cannot read an unquoted value with an equals sign, and a comma would make it a sweep.
    """
    last = [key.rpartition(".")[2].rpartition("/")[2] for key in values]
    names = [one if last.count(one) == 1 else key for one, key in zip(last, values, strict=True)]
    parts = [f"{name}-{_brief(text)}" for name, text in zip(names, values.values(), strict=True)]
    return re.sub(r"[^\w.-]+", "-", "_".join(parts), flags=re.ASCII)[:MAX_NAME_LENGTH].strip("-_.")


def _brief(text: str) -> str:
    """A number in few digits, as a search draws many."""
    try:
        return f"{float(text):.4g}" if len(text) > 7 else text
    except ValueError:
        return text


def parse_value(text: str) -> Any:
    """What Hydra reads where the text is typed: `1e-3` is a number, `null` is None."""
    (override,) = parse_overrides([f"value={text}"])
    return override.value()
