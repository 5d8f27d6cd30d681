"""Secrets from environment variables: passed to components, but never saved.

A variable that `oc.env` reads is secret if its name, or the key that it is read for, looks secret.
Everything that is saved is resolved with `${oc.env:NAME}` in place of its value, however the
configuration spells that it reads the variable. So what is saved never contained the value.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import Node
from omegaconf.resolvers import oc

from app.config.nested import dotted, get_at, iter_leaves, map_strings
from app.config.resolvers import replaced_resolver
from app.config.schema import Config
from app.config.types import to_dataclass
from app.runtime.errors import ConfigError, ConfigIssue

SECRET_REFERENCE = re.compile(r"\$\{oc\.env:(\w+)\}")
SECRET_PARTS = ("token", "secret", "passw", "passphrase", "credential", "apikey", "api_key")
SECRET_WORDS = ("auth", "oauth", "authorization", "pwd", "pat", "dsn")
SECRET_LAST_WORDS = ("key", "keys")  # matches OPENAI_KEY, but not KEYBOARD or KEY_SIZE
SHELL_VARIABLES = ("PWD", "OLDPWD")  # folders, not passwords
PUBLIC_KEYS = ("name", "tags", "notes")  # written for people; secrets are never inserted here
# Groups whose texts become names of columns and classes, which are saved.
NAMING_KEYS = ("metric", "loss", "data.class_names")
MIN_REPLACED_LENGTH = 8  # shorter values are only redacted where they are the complete text
UNSET = object()
_read_values: dict[str, str] = {}  # secret variables that this process has read, for errors


def looks_secret(name: str) -> bool:
    """Return whether a variable or key is named like a token, a key or a password."""
    if name in SHELL_VARIABLES:
        return False
    name = name.lower()
    words = re.split(r"[^a-z0-9]+", name)
    return (
        any(part in name for part in SECRET_PARTS)
        or any(word in SECRET_WORDS for word in words)
        or words[-1] in SECRET_LAST_WORDS
    )


@contextmanager
def recorded_secrets() -> Iterator[dict[str, str]]:
    """Yield a dict that receives each secret variable that `oc.env` reads, as name -> value."""
    read: dict[str, str] = {}

    def read_env(name: str, default: Any = UNSET, *, _node_: Node) -> str | None:
        value = _read_env(name, default)
        if value and name in os.environ and (looks_secret(name) or looks_secret(_key(_node_))):
            read[name] = _read_values[name] = value
        return value

    with replaced_resolver("oc.env", read_env):
        yield read


@contextmanager
def hidden_secrets(names: Container[str] = _read_values) -> Iterator[None]:
    """Let `oc.env` return `${oc.env:NAME}` for variables that look secret, and for these.

    Args:
        names: By default all that this process has read as secrets.
    """

    def read_env(name: str, default: Any = UNSET) -> str | None:
        value = _read_env(name, default)
        is_secret = value and name in os.environ and (name in names or looks_secret(name))
        return reference(name) if is_secret else value

    with replaced_resolver("oc.env", read_env):
        yield


def _read_env(name: str, default: Any) -> str | None:
    return oc.env(name) if default is UNSET else oc.env(name, default)


def _key(node: Node) -> str:
    """Return the last key of a node that is not an index of a list."""
    name, parent = node._key(), node._get_parent_container()
    while isinstance(name, int) and parent is not None:
        name, parent = parent._key(), parent._get_parent_container()
    return str(name)


def reference(name: str) -> str:
    """Return what stands for the value of a secret variable in everything that is saved."""
    return f"${{oc.env:{name}}}"


def referenced_secrets(plain: Any) -> dict[str, str]:
    """Return the variables that a resolved configuration refers to and that are set."""
    texts = [text for _, text in iter_leaves(plain) if isinstance(text, str)]
    names = [name for text in texts for name in SECRET_REFERENCE.findall(text)]
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def remember_secrets(plain: Any) -> None:
    """Redact the secrets of a configuration in the errors of a process that has not resolved it."""
    _read_values.update(referenced_secrets(plain))


def transformed_secrets(
    real: Any, hidden: Any, secrets: Mapping[str, str]
) -> Iterator[ConfigIssue]:
    """Yield an issue for each value that is more than a text with a secret inserted.

    Args:
        real: Configuration resolved with the values of the secrets.
        hidden: The same with their references instead.
        secrets: Names and values.
    """
    real, hidden = dict(iter_leaves(real)), dict(iter_leaves(hidden))
    transformed = [
        path for path, text in hidden.items() if not _reveals(text, real.get(path), secrets)
    ]
    # Any other key of such a path may itself be computed from a secret.
    transformed += [path[:1] for path in real if path not in hidden]
    problem = (
        f" is computed from a secret ({', '.join(secrets)}); a secret can only be inserted in text"
    )
    for path in dict.fromkeys(transformed):
        if path[0] not in PUBLIC_KEYS:
            yield ConfigIssue(dotted(path), problem)


def _reveals(hidden: Any, value: Any, secrets: Mapping[str, str]) -> bool:
    """Return whether a value is what `reveal` makes of the one without secrets."""
    if repr(hidden) == repr(value):
        return True
    revealed = reveal_text(hidden, secrets) if isinstance(hidden, str) else ""
    # A path from a variable is saved as the variable, and absolute or not like its value.
    return value in (revealed, str(Path(revealed).absolute()))


def redact(node: Any, secrets: Mapping[str, str]) -> Any:
    """Replace every secret value by `${oc.env:NAME}`."""
    return map_strings(lambda text: redact_values(text, secrets), node) if secrets else node


def redact_values(text: str, secrets: Mapping[str, str]) -> str:
    """Replace every secret value in a text by `${oc.env:NAME}`."""
    for name, value in sorted(secrets.items(), key=lambda item: -len(item[1])):
        if text == value or len(value) >= MIN_REPLACED_LENGTH:
            text = text.replace(value, reference(name))
    return text


def redact_text(text: str) -> str:
    """Redact a message or trace: the secrets read by this process, and variables that look secret.

    Shorter values are not recognized, they could be part of any word.
    """
    named = {name: value for name, value in os.environ.items() if looks_secret(name)}
    secrets = named | _read_values
    return redact_values(
        text, {name: v for name, v in secrets.items() if len(v) >= MIN_REPLACED_LENGTH}
    )


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
        for name in (SECRET_REFERENCE.findall(text) if isinstance(text, str) else ())
        if (problem := _reference_problem(dotted(path), name))
    ]
    if issues:
        raise ConfigError(issues)
    revealed: dict[str, Any] = map_strings(reveal_text, plain)
    return revealed


def _reference_problem(key: str, name: str) -> str | None:
    if name not in os.environ:
        return f"the environment variable {name} is not set; secrets are not saved"
    if f"{key}.".startswith(tuple(f"{group}." for group in NAMING_KEYS)):
        return "names of columns and classes must not contain a secret"
    return None


def reveal_text(text: str, values: Mapping[str, str] = os.environ) -> str:
    """Replace every `${oc.env:NAME}` in a text by the value of the variable, if it has one."""
    return SECRET_REFERENCE.sub(lambda match: values.get(match[1], match[0]), text)


def reveal_read_secrets(text: str) -> str:
    """Replace `${oc.env:NAME}` by the values of secrets that this process has read before."""
    return reveal_text(text, _read_values)


def unexpected_env_reads(plain: Any, current: Any) -> Iterator[ConfigIssue]:
    """Yield variables that a saved configuration reads where the current one does not.

    A run from someone else could send their values anywhere.

    Args:
        plain: Configuration of the saved run.
        current: Configuration composed from the current command line.
    """
    for path, text in iter_leaves(plain):
        is_read = isinstance(text, str) and SECRET_REFERENCE.search(text)
        if is_read and text != get_at(current, path):
            problem = (
                f"={text!r}: the saved run reads this variable; "
                f"to allow it, add ++{dotted(path)}='{text}' to the command line"
            )
            yield ConfigIssue(dotted(path), problem)
