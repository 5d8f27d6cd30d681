"""Replace the `auto` values of the data by what the data say, before a run starts."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.config.instantiate import Instantiator
from app.config.nested import iter_leaves, map_strings
from app.config.resolve import PlainConfig
from app.config.saved import QUOTE, SavedConfig, resolve_saved
from app.config.schema import AUTO, DATA_FACTS, Config
from app.config.secrets import redact_text, reveal
from app.config.types import UNKNOWN, to_dataclass
from app.config.validate import Overridden, config_issues
from app.runtime.errors import ConfigError, ConfigIssue, StorageError, UserError

if TYPE_CHECKING:
    from app.data.inspection import DataReport

IRRELEVANT = (
    *("batch_size", "eval_batch_size", "drop_last", "memory", "loader", "augment"),
    *("cache_size", "cache_folder"),
)
# Reports of this process. A command checks its jobs before it runs them, and a sweep has many.
_reports: dict[str, DataReport] = {}


def read_data(
    saved: SavedConfig,
    plain: PlainConfig,
    trusted: Sequence[str],
    known_issues: Sequence[ConfigIssue],
    is_new: bool,
    overridden: Overridden,
) -> DataReport | None:
    """Read the user's own data, if some value is `auto` or the data are new.

    Args:
        saved: The configuration as it will be saved.
        plain: The same, resolved.
        trusted: Modules that the user trusts by name.
        known_issues: Errors in the configuration that were found before.
        is_new: Whether the data are not those of a saved run, which were read before.
        overridden: What today's command sets.

    Raises:
        ConfigError: The configuration has other errors, or the data have.
    """
    data = plain.get("data")
    if not isinstance(data, dict):
        return None
    names = [name for name in DATA_FACTS if data.get(name) == AUTO]
    if not names and not (is_new and data.get("path") is not None):
        return None
    # Everything else must be valid first: nothing is built from a configuration with errors.
    blank = resolve_saved(with_data_facts(saved, dict.fromkeys(names, UNKNOWN)))
    issues = config_issues(blank, trusted, known_issues, overridden)
    if issues or overridden.has_errors:
        raise ConfigError(issues)
    key = json.dumps(_relevant_values(plain), sort_keys=True) + _fingerprint(data)
    if key not in _reports:
        _reports[key] = _inspect(plain, trusted)
    return _reports[key]


def with_data_facts(saved: SavedConfig, facts: dict[str, Any]) -> SavedConfig:
    """Return a copy of a configuration with these values of the data, names as they are."""
    saved = copy.deepcopy(saved)
    saved["data"] |= map_strings(lambda text: text.replace("${", QUOTE), facts)
    return saved


def _relevant_values(plain: PlainConfig) -> dict[str, Any]:
    data = {name: value for name, value in plain["data"].items() if name not in IRRELEVANT}
    overfit = plain["trainer"]["overfit_batches"]
    return {"data": data, "mode": plain["mode"], "predict": plain["predict"], "overfit": overfit}


def _fingerprint(data: dict[str, Any]) -> str:
    """Return the sizes and times of all files that the sources name, as a text."""
    texts = {leaf for _, leaf in iter_leaves(data["source"]) if isinstance(leaf, str)}
    return repr([_stamps(Path(text)) for text in sorted(texts) if Path(text).is_absolute()])


def _stamps(path: Path) -> list[tuple[int, int]]:
    return [(stat.st_size, stat.st_mtime_ns) for stat in _iter_stats(path)]


def _iter_stats(path: Path) -> Iterator[os.stat_result]:
    if path.is_file():
        yield path.stat()
    for folder, _, names in os.walk(path):
        yield from (os.lstat(Path(folder, name)) for name in names)


def _inspect(plain: PlainConfig, trusted: Sequence[str]) -> DataReport:
    from app.data.inspection import inspect_data

    config = to_dataclass(reveal(plain), Config)
    try:
        return inspect_data(config, Instantiator(trusted))
    except (ConfigError, StorageError):
        raise
    except UserError as error:
        raise ConfigError([ConfigIssue("", redact_text(str(error)))]) from error
