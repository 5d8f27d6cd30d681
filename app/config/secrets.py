"""Secrets from environment variables: passed to components, but never saved.

Where a configuration reads the environment (`${oc.env:NAME}`), the value stays unresolved as
`${oc.env:NAME}` if the name of the variable, or the key that it is read for, looks secret.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

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
    texts = list(_env_texts(raw, ""))
    if not texts:
        return {}
    reads = [(key, name) for key, text in texts for name in ENV_READ.findall(text)]
    names = [name for key, name in reads if looks_secret(key) or looks_secret(name)]
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def _env_texts(node: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield (last key, text) of every value that reads the environment."""
    if isinstance(node, dict):
        for name, child in node.items():
            yield from _env_texts(child, str(name))
    elif isinstance(node, list):
        for child in node:
            yield from _env_texts(child, key)
    elif isinstance(node, str) and ENV_RESOLVER in node:
        yield key, node


def redact(node: Any, secrets: Mapping[str, str]) -> Any:
    """Replace every secret value by `${oc.env:NAME}`, except in `_target_`."""
    if isinstance(node, dict):
        return {k: v if k == "_target_" else redact(v, secrets) for k, v in node.items()}
    if isinstance(node, list):
        return [redact(value, secrets) for value in node]
    return redact_values(node, secrets) if isinstance(node, str) else node


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
    issues: list[ConfigIssue] = []
    revealed: dict[str, Any] = _reveal(plain, "", issues)
    if issues:
        raise ConfigError(issues)
    return revealed


def _reveal(node: Any, key: str, issues: list[ConfigIssue]) -> Any:
    prefix = f"{key}." if key else ""
    if isinstance(node, dict):
        return {name: _reveal(child, f"{prefix}{name}", issues) for name, child in node.items()}
    if isinstance(node, list):
        return [_reveal(child, f"{prefix}{index}", issues) for index, child in enumerate(node)]
    if not isinstance(node, str):
        return node
    for name in SECRET_REFERENCE.findall(node):
        if name not in os.environ:
            problem = (
                f"={node!r}: the environment variable {name} is not set; secrets are not saved"
            )
            issues.append(ConfigIssue(key, problem))
    return SECRET_REFERENCE.sub(lambda match: os.environ.get(match[1], ""), node)


def unexpected_env_reads(plain: Any, current: Any, key: str = "") -> Iterator[ConfigIssue]:
    """Yield variables that a saved configuration reads where the current one does not.

    A run from someone else could send their values anywhere.

    Args:
        plain: Configuration of the saved run.
        current: Configuration composed from the current command line.
        key: Key of both.
    """
    prefix = f"{key}." if key else ""
    if isinstance(plain, dict):
        for name, child in plain.items():
            other = current.get(name) if isinstance(current, dict) else None
            yield from unexpected_env_reads(child, other, f"{prefix}{name}")
    elif isinstance(plain, list):
        for index, child in enumerate(plain):
            exists = isinstance(current, list) and index < len(current)
            other = current[index] if exists else None
            yield from unexpected_env_reads(child, other, f"{prefix}{index}")
    elif isinstance(plain, str) and SECRET_REFERENCE.search(plain) and plain != current:
        problem = (
            f"={plain!r}: the saved run reads this variable; "
            f"to allow it, add ++{key}='{plain}' to the command line"
        )
        yield ConfigIssue(key, problem)
