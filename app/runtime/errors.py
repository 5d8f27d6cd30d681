"""What a user did wrong, said in one line each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class UserError(ValueError):
    """Something only the user can put right; shown without a stack trace."""

    exit_code = 1  # of a run that it ends


class StorageError(UserError):
    """Files cannot be written: the disk is full, the folder is gone, a permission is lost."""

    exit_code = 74  # as `EX_IOERR` of sysexits.h


class NonFiniteError(UserError):
    """The loss or a gradient is no number."""

    exit_code = 65  # as `EX_DATAERR` of sysexits.h


ERRORS_BY_EXIT_CODE = {kind.exit_code: kind for kind in (UserError, StorageError, NonFiniteError)}


@dataclass(frozen=True)
class ConfigIssue:
    """One wrong place in the configuration: where, and what is wrong with it."""

    key: str
    problem: str

    def __str__(self) -> str:
        return f"{self.key}{self.problem}"


class ConfigError(UserError):
    """All mistakes of a configuration at once."""

    def __init__(self, mistakes: list[ConfigIssue]) -> None:
        self.issues = list(dict.fromkeys(mistakes))
        count = len(self.issues)
        head = f"{count} mistake{'s' if count > 1 else ''} in the configuration:"
        super().__init__("\n".join([head, *(f"  {mistake}" for mistake in self.issues)]))


@contextmanager
def as_user_error(key: str | None = None) -> Iterator[None]:
    """Looks at files that the user has named; what the system refuses is one clear error.

    Args:
        key: Which names them, where it is known.

    Raises:
        UserError: The system has refused, and says which file, or the key does.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and key is None:
            raise  # nothing that a user could put right
        problem = describe_read_error(error)
        mistake = (
            UserError(problem) if key is None else ConfigError([ConfigIssue(key, f": {problem}")])
        )
        raise mistake from error


def describe_read_error(error: OSError) -> str:
    """Which file the system does not let be read, and why."""
    return f"{error.filename or 'it'} cannot be read: {error.strerror or error}"


def as_storage_error(error: OSError) -> StorageError:
    """What to raise where the system does not let a file be changed."""
    return StorageError(f"{error.filename} cannot be written: {error.strerror or error}")


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?` with the closest of `allowed`, or nothing."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def one_of(allowed: Iterable[str]) -> str:
    """The allowed words as a sentence's end."""
    return ", ".join(sorted(allowed)) or "nothing"
