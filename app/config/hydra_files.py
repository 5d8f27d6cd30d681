"""Check where Hydra would write: the folders of runs and sweeps, and log files.

Hydra resolves these keys itself when a job starts. By then their values could differ, so that what
was checked replaces the interpolation, except for references to what only the job knows.
"""

from __future__ import annotations

import copy
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from app.config.nested import KeyPath, dotted, get_at, iter_leaves
from app.config.overrides import is_overridden
from app.config.resolve import hydra_config, resolve_twice
from app.config.types import MISSING, UNKNOWN
from app.runtime.errors import ConfigIssue

LOGGING_NODES = ("job_logging", "hydra_logging")
RUN_DIR, SWEEP_DIR = ("hydra", "run", "dir"), ("hydra", "sweep", "dir")
SUBDIR, OUTPUT_SUBDIR = ("hydra", "sweep", "subdir"), ("hydra", "output_subdir")
JOB_NAME = ("hydra", "job", "name")
SWEEPER, STORAGE = ("hydra", "sweeper"), ("hydra", "sweeper", "storage")
NAME_KEYS = ("name", "output", "resume", "sweep.resume")  # typed ones may leave a folder
# Stand for what Hydra sets when a job starts. Nobody can guess them, so no text depends on them.
JOB_NUM = secrets.randbits(62)
OUTPUT_DIR = f"/{secrets.token_hex(16)}"
JOB_REFERENCES = {str(JOB_NUM): "${hydra.job.num}", OUTPUT_DIR: "${hydra.runtime.output_dir}"}


def pin_hydra_paths(config: DictConfig, overrides: Sequence[Override]) -> list[ConfigIssue]:
    """Resolve where Hydra writes, in place, and return every path that is not allowed.

    Args:
        config: Composed configuration including the `hydra` node.
        overrides: Overrides from the command line; files and folders set there are allowed.
    """
    probe = copy.deepcopy(config)
    with read_write(probe.hydra), open_dict(probe.hydra):
        probe.hydra.job.num, probe.hydra.job.id = JOB_NUM, str(JOB_NUM)
        probe.hydra.runtime.output_dir = OUTPUT_DIR
    with hydra_config(probe):
        real, hidden, _ = resolve_twice(probe, ["hydra"])
    issues = list(_sweeper_issues(real, hidden))
    for path in (RUN_DIR, SWEEP_DIR, SUBDIR, OUTPUT_SUBDIR, JOB_NAME, *_log_files(real)):
        value = get_at(real, path)
        if value in (None, MISSING) or (value == UNKNOWN and path in (RUN_DIR, SWEEP_DIR)):
            continue  # Hydra needs no such folder, or it is reported where it is needed
        is_typed = path != JOB_NAME and is_overridden(dotted(path), overrides)
        problem = _secret_problem(value, get_at(hidden, path)) or (
            None if is_typed else _problem(path, value, real, overrides)
        )
        if problem is not None:
            issues.append(ConfigIssue(dotted(path), problem))
        elif path not in (RUN_DIR, SWEEP_DIR) and not is_typed:
            _pin(config, path, value)
    return issues


def _sweeper_issues(real: dict[str, Any], hidden: dict[str, Any]) -> Iterator[ConfigIssue]:
    """Yield settings of the sweeper, saved with the sweep and its jobs, that contain a secret."""
    for path, value in iter_leaves(get_at(real, SWEEPER), SWEEPER):
        shown = get_at(hidden, path)
        if value != shown and path != STORAGE:
            yield ConfigIssue(dotted(path), f"={shown!r}: what is saved must not contain a secret")


def _log_files(plain: dict[str, Any]) -> Iterator[KeyPath]:
    for name in LOGGING_NODES:
        for path, _ in iter_leaves(plain["hydra"].get(name), ("hydra", name)):
            if path[-1] == "filename":
                yield path


def _secret_problem(value: Any, hidden: Any) -> str | None:
    if value == hidden:
        return None
    return f"={hidden!r}: names of files and folders must not contain a secret"


def _problem(
    path: KeyPath, value: Any, real: dict[str, Any], overrides: Sequence[Override]
) -> str | None:
    """Return why Hydra must not write there, or None."""
    if value == UNKNOWN or not isinstance(value, str):
        return " does not resolve to a path"
    if path == JOB_NAME:
        is_valid = re.fullmatch(r"[\w.-]+", value, flags=re.ASCII) and ".." not in value
        problem = f"={value!r} contains invalid characters; allowed: letters, digits, _ . -"
        return None if is_valid else problem
    named = any(is_overridden(key, overrides) for key in NAME_KEYS)
    if path in (RUN_DIR, SWEEP_DIR):
        return f"={value!r} contains '..'" if ".." in Path(value).parts and not named else None
    run_dir, sweep_dir = (_folder(get_at(real, key)) for key in (RUN_DIR, SWEEP_DIR))
    if path == SUBDIR:
        is_inside = named or _is_inside(sweep_dir, sweep_dir / value)
        return None if is_inside else f"={value!r} is not a folder inside the sweep folder"
    if path == OUTPUT_SUBDIR:
        is_inside = _is_inside(run_dir, run_dir / value)
        return None if is_inside else f"={value!r} is not a folder inside the run folder"
    if path[1] == "hydra_logging" and any(token in value for token in JOB_REFERENCES):
        return (
            " is opened before any job has a number or a folder; allowed: text, ${hydra.sweep.dir}"
        )
    file = Path(value.replace(OUTPUT_DIR, str(run_dir)))
    if (
        "://" in value
        or "\\" in value
        or not (_is_inside(run_dir, file) or _is_inside(sweep_dir, file))
        or file.suffix != ".log"  # the folders may be any, also one with files of yours
    ):
        shown = value.replace(OUTPUT_DIR, JOB_REFERENCES[OUTPUT_DIR])
        allowed = f"{JOB_REFERENCES[OUTPUT_DIR]}/NAME.log"
        return f"={shown!r} is not a .log file in the run folder; allowed: {allowed}"
    return None


def _folder(value: Any) -> Path:
    return Path(value if isinstance(value, str) else OUTPUT_DIR)


def _is_inside(folder: Path, path: Path) -> bool:
    """Return whether a path is below a folder, links resolved."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _pin(config: DictConfig, path: KeyPath, value: Any) -> None:
    """Replace an interpolation by its value, with references to what Hydra sets later."""
    *groups, last = path
    node: Any = config
    for name in groups:
        node = node[name]
    if not OmegaConf.is_interpolation(node, last):
        return
    value = value.replace("${", "\\${")
    for token, reference in JOB_REFERENCES.items():
        value = value.replace(token, reference)
    with read_write(node):
        node[last] = value
