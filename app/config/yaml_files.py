"""Read YAML files of a folder that may come from somebody else."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

from app.config.limits import MAX_FILE_BYTES, YAML_LOADER, yaml_problem
from app.runtime.errors import UserError
from app.runtime.small_files import read_small_file

T = TypeVar("T", dict[str, Any], list[Any])
# Raised for values that YAML can write but Python cannot hold, such as the date 2001-02-31.
YAML_ERRORS = (yaml.YAMLError, ValueError, TypeError, OverflowError, AttributeError)
SECTION_START = re.compile(r"^(?=[A-Za-z_])", re.MULTILINE)
GROUP = re.compile(
    r"([A-Za-z_]\w*):\n((?:  .*\n|\n)+)"
)  # a key, and nothing but its group below it
MAX_SPLITS = 3  # levels of groups
MAX_CACHED_LENGTH = 1_000  # characters of a section


def read_yaml(folder: Path, name: str, kind: type[T]) -> T:
    """Return the group or list in a YAML file of a folder; an empty one if there is no such file.

    Args:
        folder: The folder, which links may not leave.
        name: Path of the file in the folder.
        kind: What the file contains: `dict` or `list`.

    Raises:
        UserError: The file cannot be read, is too large or damaged, or contains anything else.
    """
    text, path = read_small_file(folder, name, MAX_FILE_BYTES), folder / name
    if text is None:
        return kind()
    try:
        problem = yaml_problem(text)
        content = None if problem else yaml.load(text, Loader=YAML_LOADER)
    except YAML_ERRORS as error:
        problem = " ".join(str(error).split())
    if problem:
        raise UserError(f"{path} is damaged: {problem}")
    if content is not None and not isinstance(content, kind):
        found = type(content).__name__
        raise UserError(f"{path} is damaged: it contains a {found}; allowed: a {kind.__name__}")
    return kind() if content is None else content


def read_similar_yaml(folder: Path, name: str) -> dict[str, Any]:
    """Return what `read_yaml` returns for a group, fast if many files share most of their text.

    The result must not be changed: its parts are shared by all files that contain the same text.

    Raises:
        UserError: The file cannot be read, is too large or damaged, or contains anything else.
    """
    text = read_small_file(folder, name, MAX_FILE_BYTES)
    try:
        return _load_sections(text or "", MAX_SPLITS)
    except YAML_ERRORS:  # or something that cannot be divided
        return read_yaml(folder, name, dict)


def _load_sections(text: str, splits: int) -> dict[str, Any]:
    """Load a group section by section, each from a key at the left margin to the next one.

    Raises:
        yaml.YAMLError | ValueError: The sections are no valid groups by themselves.
    """
    content: dict[str, Any] = {}
    for section in filter(None, SECTION_START.split(text)):
        is_short = len(section) <= MAX_CACHED_LENGTH
        content |= (_load_cached if is_short else _load_section)(section, splits)
    return content


def _load_section(text: str, splits: int) -> dict[str, Any]:
    group = GROUP.fullmatch(text) if splits else None
    if group is not None and len(text) > MAX_CACHED_LENGTH:
        return {group[1]: _load_sections(group[2][2:].replace("\n  ", "\n"), splits - 1)}
    if problem := yaml_problem(text):
        raise ValueError(problem)
    content = yaml.load(text, Loader=YAML_LOADER)
    if not isinstance(content, dict):
        raise ValueError(f"contains a {type(content).__name__}")
    return content


_load_cached = lru_cache(maxsize=1_000)(_load_section)
