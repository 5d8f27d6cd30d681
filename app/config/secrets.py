"""Secrets from environment variables: passed to components, but never saved.

A variable that `oc.env` reads is secret if its name, or the key that it is read for, looks secret.
In this program `oc.env` returns `${oc.env:NAME}` for it, whoever asks, so that no configuration
ever contains the value. Only the arguments of a run's components are given it, by `reveal`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf.resolvers import oc

from app.config.limits import current_path
from app.config.nested import KeyPath, dotted, get_at, iter_leaves, map_strings
from app.config.resolvers import replaced_resolver
from app.config.schema import Config
from app.config.types import to_dataclass
from app.runtime.errors import ConfigError, ConfigIssue

SECRET_REFERENCE = re.compile(r"\$\{oc\.env:([\w.-]+)\}")
SECRET_NAME = re.compile(
    r"token|secret|passw|passphrase|credential|api.?key"
    r"|\b(auth|oauth|authorization|pwd|pat|dsn)\b"
    r"|\bkeys?$"  # matches OPENAI_KEY, but not KEYBOARD or KEY_SIZE
)
SHELL_VARIABLES = ("PWD", "OLDPWD")  # folders, not passwords
PUBLIC_KEYS = ("name", "tags", "notes")  # written for people; secrets are never inserted here
# Here texts become names of columns and classes, which are saved.
NAMING_KEYS = (("metric",), ("loss",), ("data", "class_names"))
FILE_KEYS = ("file", "cache_folder")  # what is written has these names
MIN_REPLACED_LENGTH = 8  # characters of a value that is redacted in errors
secret_names: set[str] = set()  # variables that this process has read as secrets; it only grows


def looks_secret(name: str) -> bool:
    """Return whether a variable or key is named like a token, a key or a password."""
    words = name.lower().replace("_", " ")
    return name not in SHELL_VARIABLES and bool(SECRET_NAME.search(words))


@contextmanager
def hidden_secrets() -> Iterator[None]:
    """Let `oc.env` return `${oc.env:NAME}` for secret variables while the context is open."""

    def read_env(name: str, *default: Any) -> str | None:
        value: str | None = oc.env(name, *default)
        if value and name in os.environ and (looks_secret(name) or _is_read_for_secret_key()):
            secret_names.add(name)
        return reference(name) if value and name in secret_names else value

    with replaced_resolver("oc.env", read_env):
        yield


def _is_read_for_secret_key() -> bool:
    names = [name for name in current_path() if isinstance(name, str)]  # no indices of lists
    return looks_secret(names[-1]) if names else False


def reference(name: str) -> str:
    """Return what stands for the value of a secret variable in everything that is saved."""
    return f"${{oc.env:{name}}}"


def referenced_secrets(text: object) -> list[str]:
    """Return the variables whose values `reveal` would insert in a text."""
    return SECRET_REFERENCE.findall(text) if isinstance(text, str) else []


def remember_secrets(plain: Any) -> None:
    """Redact the secrets of a configuration in the errors of a process that has not resolved it."""
    secret_names.update(name for _, text in iter_leaves(plain) for name in referenced_secrets(text))


def redact_text(text: str) -> str:
    """Redact a message or trace: the secrets read by this process, and variables that look secret.

    Short values are not recognized, they could be part of any word.
    """
    secrets = {
        name: value
        for name, value in os.environ.items()
        if len(value) >= MIN_REPLACED_LENGTH and (name in secret_names or looks_secret(name))
    }
    for name, value in sorted(secrets.items(), key=lambda item: -len(item[1])):
        text = text.replace(value, reference(name))
    return text


def reveal_config(plain: dict[str, Any]) -> Config:
    """Insert the values of secrets, except in `PUBLIC_KEYS`, and return the typed configuration.

    Raises:
        ConfigError: An environment variable is not set.
    """
    return to_dataclass(reveal(plain) | {key: plain[key] for key in PUBLIC_KEYS}, Config)


def reveal(plain: dict[str, Any]) -> dict[str, Any]:
    """Replace every `${oc.env:NAME}` by the value of the variable.

    Raises:
        ConfigError: An environment variable is not set, or is read where names come from.
    """
    issues = [
        ConfigIssue(dotted(path), f"={text!r}: {problem}")
        for path, text in iter_leaves(plain)
        for name in referenced_secrets(text)
        if (problem := _reference_problem(path, name))
    ]
    if issues:
        raise ConfigError(issues)
    revealed: dict[str, Any] = map_strings(reveal_text, plain)
    return revealed


def _reference_problem(path: KeyPath, name: str) -> str | None:
    if name not in os.environ:
        return f"the environment variable {name} is not set; secrets are not saved"
    if any(path[: len(key)] == key for key in NAMING_KEYS):
        return "names of columns and classes must not contain a secret"
    return "names of files must not contain a secret" if path[-1] in FILE_KEYS else None


def reveal_text(text: str) -> str:
    """Replace every `${oc.env:NAME}` in a text by the value of the variable, if it is set."""
    return SECRET_REFERENCE.sub(lambda match: os.environ.get(match[1], match[0]), text)


def unexpected_env_reads(plain: Any, current: Any) -> Iterator[ConfigIssue]:
    """Yield variables that a saved configuration reads where the current one does not.

    A run from someone else could send their values anywhere.

    Args:
        plain: Configuration of the saved run.
        current: Configuration composed from the current command line.
    """
    for path, text in iter_leaves(plain):
        if referenced_secrets(text) and text != get_at(current, path):
            problem = (
                f"={text!r}: the saved run reads this variable; "
                f"to allow it, add ++{dotted(path)}='{text}' to the command line"
            )
            yield ConfigIssue(dotted(path), problem)
