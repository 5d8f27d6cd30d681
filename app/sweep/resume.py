"""Resume a sweep from its folder alone: with its command, its configuration files and its paths."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override

from app.config.allowlist import is_trusted, trusted_from_environment
from app.config.nested import dotted, iter_leaves
from app.config.overrides import parse_overrides, quote, raw_override
from app.config.resolve import cli_trusted
from app.runtime.errors import ConfigError, ConfigIssue, as_user_error
from app.sweep.folder import FROZEN_PROVIDERS, SweepFolder
from app.sweep.launchers.options import has_unsafe_option

TRUST_KEY, STORAGE_KEY = "trusted_targets", "hydra.sweeper.storage"
RESTRICTED_KEYS = (  # take effect from the command line only, as do the keys above and below them
    TRUST_KEY,
    STORAGE_KEY,
    "hydra.job",
    "hydra.job_logging",
    "hydra.hydra_logging",
    "hydra.output_subdir",
    "hydra.searchpath",
    "hydra.run",
    "hydra.sweep",
    "hydra.overrides",
    "sweep.trial",
)
# Overrides with which a sweep still has the jobs it was started with.
UNCHANGING_KEYS = ("sweep.", "hydra", TRUST_KEY)
PATH_NAMES = ("path", "root", "cache_folder")  # of `data` and its sources


@as_user_error("sweep.resume")
def use_saved_command(args: argparse.Namespace) -> None:
    """Complete a command line that has `sweep.resume`, in place, with what the sweep has saved.

    Its configuration files are used if the command names none, and its overrides if the command
    has none of its own.

    Raises:
        UserError: The sweep folder is damaged, or some overrides have to be repeated by the user.
    """
    typed = _by_key(args.overrides)
    if "sweep.resume" not in typed:
        return
    folder = SweepFolder(Path(str(typed["sweep.resume"].value())).expanduser().absolute())
    if not folder.exists:
        return  # reported with the other errors of the command
    is_forced = "sweep.force" in typed and typed["sweep.force"].value() is True
    if not (is_forced or args.config_path or args.config_dir or args.config_name):
        args.config_path, args.config_dir = map(folder.frozen_conf, FROZEN_PROVIDERS)
        args.config_name = folder.config_name
    if all(key.lstrip("+~").startswith(UNCHANGING_KEYS) for key in typed):
        if issues := list(iter_trust_issues(folder, args.overrides)):
            raise ConfigError(issues)
        # With a new launcher, the options of the saved one no longer apply.
        dropped = ("hydra.launcher.",) if "hydra/launcher" in typed else ()
        saved = _by_key(folder.overrides)
        added = [key for key in saved if key not in typed and not key.startswith(dropped)]
        args.overrides = [*args.overrides, *(raw_override(saved[key]) for key in added)]
        if folder.working_folder != str(Path.cwd()):
            args.overrides = [
                *args.overrides,
                *_data_path_overrides(folder, _by_key(args.overrides)),
            ]


def _data_path_overrides(folder: SweepFolder, overrides: dict[str, Override]) -> list[str]:
    """Overrides for the data paths of a sweep that are relative to another working directory."""
    if any(o.is_sweep_override() and key.startswith("data") for key, o in overrides.items()):
        return []
    data: Any = folder.read_base().get("data")
    paths = {dotted(path): leaf for path, leaf in iter_leaves(data, ("data",))}
    return [
        f"{key}={quote(value)}"
        for key, value in paths.items()
        if key.rpartition(".")[2] in PATH_NAMES and isinstance(value, str) and value.startswith("/")
    ]


def iter_trust_issues(folder: SweepFolder, cli_overrides: Sequence[str]) -> Iterator[ConfigIssue]:
    """Yield an issue for each saved override that must be repeated on the command line.

    A file cannot grant trust: overrides that choose which code runs or where files are written
    only take effect when the user gives them again, as `cli_overrides`.
    """
    typed = parse_overrides(cli_overrides)
    trusted = [*cli_trusted(typed), *trusted_from_environment()]
    for override in parse_overrides(folder.overrides):
        text = raw_override(override)
        is_restricted = is_related(override.key_or_group, RESTRICTED_KEYS)
        if text in cli_overrides or not (is_restricted or has_unsafe_option(override)):
            continue
        names = cli_trusted([override])
        if override.key_or_group != TRUST_KEY or not all(is_trusted(n, trusted) for n in names):
            problem = f": the sweep was started with {text}; repeat it here if you trust it"
            yield ConfigIssue("sweep.resume", problem)


def is_related(key: str, others: Iterable[str]) -> bool:
    """Return whether a key is one of the others, or above or below one of them."""
    return any(f"{key}.".startswith(f"{o}.") or o.startswith(f"{key}.") for o in others)


def _by_key(overrides: Sequence[str]) -> dict[str, Override]:
    return {override.get_key_element(): override for override in parse_overrides(overrides)}
