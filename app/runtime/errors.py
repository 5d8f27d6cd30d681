"""Errors that are shown to the user as one line, without a stack trace."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class UserError(ValueError):
    """An error that only the user can fix; shown without a stack trace."""

    exit_code = 1  # of a run that fails with it


class StorageError(UserError):
    """A file cannot be written: the disk is full, a folder is gone, a permission is missing."""

    exit_code = 74  # EX_IOERR of sysexits.h


class NonFiniteError(UserError):
    """The loss or a gradient is NaN or infinite."""

    exit_code = 65  # EX_DATAERR of sysexits.h


ERRORS_BY_EXIT_CODE = {kind.exit_code: kind for kind in (UserError, StorageError, NonFiniteError)}


@dataclass(frozen=True)
class ConfigIssue:
    """One error in the configuration.

    Attributes:
        key: Where it is.
        problem: What is wrong, to be read directly after the key.
    """

    key: str
    problem: str

    def __str__(self) -> str:
        return f"{self.key}{self.problem}"


class ConfigError(UserError):
    """All errors of a configuration together."""

    def __init__(self, issues: list[ConfigIssue]) -> None:
        self.issues = list(dict.fromkeys(issues))
        count = len(self.issues)
        head = f"{count} error{'s' if count > 1 else ''} in the configuration:"
        super().__init__("\n".join([head, *(f"  {issue}" for issue in self.issues)]))


@contextmanager
def as_user_error(key: str | None = None) -> Iterator[None]:
    """Turn an `OSError` about a file that the user has named into a `UserError`.

    Args:
        key: Configuration key that names the file, if known.

    Raises:
        UserError: A file could not be read; the message names the file and the reason.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and key is None:
            raise  # nothing that a user could fix
        problem = describe_read_error(error)
        raise (
            UserError(problem) if key is None else ConfigError([ConfigIssue(key, f": {problem}")])
        ) from error


def describe_read_error(error: OSError) -> str:
    """Return which file cannot be read and why."""
    return f"{error.filename or 'it'} cannot be read: {error.strerror or error}"


def as_storage_error(error: OSError) -> StorageError:
    """Return the `StorageError` for a file that could not be changed."""
    return StorageError(f"{error.filename} cannot be written: {error.strerror or error}")


def did_you_mean(word: str, allowed: Iterable[str], count: int = 1) -> str:
    """Return `; did you mean 'x'?` with the `count` closest of `allowed`, or an empty string."""
    names = {name.lower(): name for name in allowed}
    close = difflib.get_close_matches(word.lower(), names, n=count, cutoff=0.6)
    return f"; did you mean {', '.join(repr(names[name]) for name in close)}?" if close else ""


def join_choices(allowed: Iterable[str]) -> str:
    """Return the allowed values, sorted and separated by commas."""
    return ", ".join(sorted(allowed)) or "nothing"
