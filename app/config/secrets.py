"""Secrets from environment variables: passed to components, but never saved.

Where a configuration reads the environment (`${oc.env:NAME}`), the value stays unresolved as
`${oc.env:NAME}` if the name of the variable, or the key that it is read for, looks secret.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from app.config.nested import KeyPath, dotted, get_at, iter_leaves, map_strings
from app.config.schema import Config
from app.config.types import to_dataclass
from app.runtime.errors import ConfigError, ConfigIssue

ENV_RESOLVER = "oc.env:"
ENV_READ = re.compile(r"\$\{oc\.env:\s*['\"]?(\w+)['\"]?\s*[,}]")
SECRET_REFERENCE = re.compile(r"\$\{oc\.env:(\w+)\}")
SECRET_PARTS = ("token", "secret", "passw", "passphrase", "credential", "apikey", "api_key")
SECRET_WORDS = ("auth", "oauth", "authorization", "pwd", "pat", "dsn")
SECRET_LAST_WORDS = ("key", "keys")  # matches OPENAI_KEY, but not KEYBOARD or KEY_SIZE
SHELL_VARIABLES = ("PWD", "OLDPWD")  # folders, not passwords
PUBLIC_KEYS = ("name", "tags", "notes")  # written for people; secrets are never inserted here
MIN_REPLACED_LENGTH = 8  # shorter values are only redacted where they are the complete text


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


def find_secrets(raw: Any) -> dict[str, str]:
    """Return the secret variables that a configuration may read, as name -> value.

    Args:
        raw: Configuration with its interpolations.
    """
    reads = [
        (_last_name(path), name)
        for path, text in iter_leaves(raw)
        if isinstance(text, str) and ENV_RESOLVER in text
        for name in ENV_READ.findall(text)
    ]
    names = [name for key, name in reads if looks_secret(key) or looks_secret(name)]
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def _last_name(path: KeyPath) -> str:
    """Return the last key of a path that is not an index of a list."""
    return next((name for name in reversed(path) if isinstance(name, str)), "")


def redact(node: Any, secrets: Mapping[str, str]) -> Any:
    """Replace every secret value by `${oc.env:NAME}`."""
    return map_strings(lambda text: redact_values(text, secrets), node) if secrets else node


def redact_values(text: str, secrets: Mapping[str, str]) -> str:
    """Replace every secret value in a text by `${oc.env:NAME}`."""
    for name, value in sorted(secrets.items(), key=lambda item: -len(item[1])):
        if text == value or len(value) >= MIN_REPLACED_LENGTH:
            text = text.replace(value, f"${{oc.env:{name}}}")
    return text


def redact_text(text: str) -> str:
    """Redact the values of all environment variables that look secret, in a message or trace."""
    secrets = {
        name: value
        for name, value in os.environ.items()
        if looks_secret(name) and len(value) >= MIN_REPLACED_LENGTH
    }
    return redact_values(text, secrets)


def reveal_config(plain: dict[str, Any]) -> Config:
    """Insert the values of secrets, except in `PUBLIC_KEYS`, and return the typed configuration.

    Raises:
        ConfigError: An environment variable is not set.
    """
    return to_dataclass(reveal(plain) | {key: plain[key] for key in PUBLIC_KEYS}, Config)


def reveal(plain: dict[str, Any]) -> dict[str, Any]:
    """Replace every `${oc.env:NAME}` by the value of the variable.

    Raises:
        ConfigError: An environment variable is not set.
    """
    issues = [
        ConfigIssue(
            dotted(path),
            f"={text!r}: the environment variable {name} is not set; secrets are not saved",
        )
        for path, text in iter_leaves(plain)
        for name in (SECRET_REFERENCE.findall(text) if isinstance(text, str) else ())
        if name not in os.environ
    ]
    if issues:
        raise ConfigError(issues)
    revealed: dict[str, Any] = map_strings(
        lambda text: SECRET_REFERENCE.sub(lambda match: os.environ[match[1]], text), plain
    )
    return revealed


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
