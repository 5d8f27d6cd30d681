"""Values of secret environment variables: a part is given them, but nothing that is saved has them.

The rule: where a configuration reads the environment (`${oc.env:NAME}`), the value of a variable
whose name looks secret, or that is read for a key whose name does, is kept as `${oc.env:NAME}`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from app.config.schema import Config
from app.config.types import to_dataclass
from app.runtime.errors import ConfigError, ConfigIssue

ENVIRONMENT = "oc.env:"
READS = re.compile(r"\$\{oc\.env:\s*['\"]?(\w+)['\"]?\s*[,}]")
KEPT = re.compile(r"\$\{oc\.env:(\w+)\}")
ANYWHERE = ("token", "secret", "passw", "passphrase", "credential", "apikey", "api_key")
WORDS = ("auth", "oauth", "authorization", "pwd", "pat", "dsn")
KEYS = ("key", "keys")  # as the last word: OPENAI_KEY, but not KEYBOARD or KEY_SIZE
FOLDERS = ("PWD", "OLDPWD")  # of every shell
PUBLIC_KEYS = ("name", "tags", "notes")  # to people alone
LONG = 8  # characters; a shorter value is hidden only where it is all there is


def looks_secret(name: str) -> bool:
    """Whether a variable or a key is called like a token, a key or a password."""
    if name in FOLDERS:
        return False
    name = name.lower()
    words = re.split(r"[^a-z0-9]+", name)
    return (
        any(part in name for part in ANYWHERE)
        or any(word in WORDS for word in words)
        or words[-1] in KEYS
    )


def find_secrets(raw: Any) -> dict[str, str]:
    """By name the secret variables that a configuration may read.

    Args:
        raw: The configuration with its interpolations.
    """
    reads = list(_reading(raw, ""))
    if not reads:
        return {}
    read = [(key, name) for key, text in reads for name in READS.findall(text)]
    names = [name for key, name in read if looks_secret(key) or looks_secret(name)]
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def _reading(node: Any, key: str) -> Iterator[tuple[str, str]]:
    """(last key, text) of every value that reads the environment."""
    if isinstance(node, dict):
        for name, child in node.items():
            yield from _reading(child, str(name))
    elif isinstance(node, list):
        for child in node:
            yield from _reading(child, key)
    elif isinstance(node, str) and ENVIRONMENT in node:
        yield key, node


def redact(node: Any, secrets: Mapping[str, str]) -> Any:
    """The same with `${oc.env:NAME}` for every secret value; names of targets stay."""
    if isinstance(node, dict):
        return {k: v if k == "_target_" else redact(v, secrets) for k, v in node.items()}
    if isinstance(node, list):
        return [redact(value, secrets) for value in node]
    return redact_values(node, secrets) if isinstance(node, str) else node


def redact_values(text: str, secrets: Mapping[str, str]) -> str:
    """Likewise of one text."""
    for name, value in sorted(secrets.items(), key=lambda item: -len(item[1])):
        if text == value or len(value) >= LONG:
            text = text.replace(value, f"${{oc.env:{name}}}")
    return text


def redact_text(text: str) -> str:
    """A message or a trace without the values of any variable whose name looks secret."""
    secrets = {name: value for name, value in os.environ.items() if looks_secret(name)}
    return redact_values(
        text, {name: value for name, value in secrets.items() if len(value) >= LONG}
    )


def reveal_config(plain: dict[str, Any]) -> Config:
    """What a run is given, typed: the values of secrets, but for what is said to people.

    Raises:
        ConfigError: Variables are not set.
    """
    return to_dataclass(reveal(plain) | {key: plain[key] for key in PUBLIC_KEYS}, Config)


def unexpected_env_reads(plain: Any, today: Any, key: str = "") -> Iterator[ConfigIssue]:
    """Variables that a saved configuration would read, and today's does not read there.

    A stranger's run could send them anywhere.

    Args:
        plain: With what was saved.
        today: What was composed and typed now.
        key: Where both are.
    """
    inner = f"{key}." if key else ""
    if isinstance(plain, dict):
        for name, part in plain.items():
            other = today.get(name) if isinstance(today, dict) else None
            yield from unexpected_env_reads(part, other, f"{inner}{name}")
    elif isinstance(plain, list):
        for place, part in enumerate(plain):
            same = isinstance(today, list) and place < len(today)
            yield from unexpected_env_reads(part, today[place] if same else None, f"{inner}{place}")
    elif isinstance(plain, str) and KEPT.search(plain) and plain != today:
        problem = (
            f"={plain!r}: the saved run reads this variable; if it may, type ++{key}='{plain}'"
        )
        yield ConfigIssue(key, problem)


def reveal(plain: dict[str, Any]) -> dict[str, Any]:
    """What a run is given: the values instead of their names.

    Raises:
        ConfigError: Variables are not set.
    """
    mistakes: list[ConfigIssue] = []
    found: dict[str, Any] = _reveal(plain, "", mistakes)
    if mistakes:
        raise ConfigError(mistakes)
    return found


def _reveal(node: Any, key: str, mistakes: list[ConfigIssue]) -> Any:
    prefix = f"{key}." if key else ""
    if isinstance(node, dict):
        return {name: _reveal(child, f"{prefix}{name}", mistakes) for name, child in node.items()}
    if isinstance(node, list):
        return [_reveal(child, f"{prefix}{index}", mistakes) for index, child in enumerate(node)]
    if not isinstance(node, str):
        return node
    for name in KEPT.findall(node):
        if name not in os.environ:
            problem = f"={node!r}: the environment variable {name} is not set; it is never saved"
            mistakes.append(ConfigIssue(key, problem))
    return KEPT.sub(lambda found: os.environ.get(found[1], ""), node)
