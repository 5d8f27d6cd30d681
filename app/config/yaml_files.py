"""Read YAML files of a folder that may come from somebody else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml

from app.config.limits import MAX_FILE_BYTES, YAML_LOADER, yaml_problem
from app.runtime.errors import UserError
from app.runtime.small_files import read_small_file

T = TypeVar("T", dict[str, Any], list[Any])
# Raised for values that YAML can write but Python cannot hold, such as the date 2001-02-31.
YAML_ERRORS = (yaml.YAMLError, ValueError, TypeError, OverflowError, AttributeError)


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
