"""Find all wrong overrides of a command line that Hydra cannot compose.

Hydra stops at the first wrong override and suggests no alternative.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from app.config.habits import usage
from app.config.nested import get_at
from app.config.overrides import raw_override
from app.runtime.errors import ConfigError, ConfigIssue, did_you_mean, join_choices

EXTRA_BY_OPTION = {  # extras of this package that install the Hydra plugin of an option
    "hydra/launcher/joblib": "joblib",
    "hydra/launcher/submitit_local": "submitit",
    "hydra/launcher/submitit_slurm": "submitit",
    "hydra/launcher/ray": "ray",
}
NO_OPTION = r"Could not find '([^']+)/([^/']+)' Available options in '[^']+': (.*) Config search"
SEVERAL_VALUES = r"^Ambiguous value for argument '([^'=]+)=(.*)' 1\. To use it as a list"


def diagnose(
    compose: Callable[[list[str]], DictConfig], loader: ConfigLoader, overrides: Sequence[Override]
) -> tuple[DictConfig, list[ConfigIssue]]:
    """Compose without the invalid overrides, and return what is wrong with those."""
    groups = [o for o in overrides if not o.is_hydra_override() and _options(loader, o)]
    invalid = [(o, issues) for o in groups if (issues := _group_issues(loader, o))]
    rejected = [o for o, _ in invalid]
    valid_groups = [raw_override(o) for o in groups if o not in rejected]
    try:
        config = compose(valid_groups)
        raw: Any = OmegaConf.to_container(config, resolve=False)
        del raw["hydra"]
        keys = [*_dotted_keys(raw), *loader.list_groups("")]
        values = [o for o in overrides if o not in groups and not o.is_hydra_override()]
        invalid += [(o, issues) for o in values if (issues := [*_value_issues(raw, o, keys)])]
        rejected = [o for o, _ in invalid]
        composed = compose([raw_override(o) for o in overrides if o not in rejected])
    except HydraException as error:
        raise ConfigError(
            [*(issue for _, issues in invalid for issue in issues), _as_issue(error)]
        ) from error
    return composed, [issue for _, issues in invalid for issue in issues]


def _options(loader: ConfigLoader, override: Override) -> list[str]:
    return loader.get_group_options(override.key_or_group, ObjectType.CONFIG)


def _group_issues(loader: ConfigLoader, override: Override) -> list[ConfigIssue]:
    value = override.value()
    chosen = value if isinstance(value, list) else [value]
    options = _options(loader, override)
    return [
        ConfigIssue(
            override.key_or_group,
            f"={choice!r} does not exist; allowed: {join_choices(options)}"
            f"{did_you_mean(str(choice), options)}",
        )
        for choice in chosen
        if choice is not None and choice not in options
    ]


def _value_issues(
    raw: dict[str, Any], override: Override, keys: Sequence[str]
) -> Iterator[ConfigIssue]:
    key = override.key_or_group
    exists = key in keys
    if override.is_add() and exists and not isinstance(get_at(raw, key.split(".")), dict):
        yield ConfigIssue(f"+{key}", f" already exists; use {key}=... to change it")
    elif not override.is_add() and not override.is_force_add() and not exists:
        value = raw_override(override).partition("=")[2]
        typed = "" if override.is_delete() else f"={value}"
        hint = _hint(raw, key, value, keys)
        yield ConfigIssue(key, f"{typed} is not a known key; {hint}")
    elif override.is_delete() and get_at(raw, key.split(".")) is None:
        yield ConfigIssue(f"~{key}", ": it is null, so there is nothing to remove")


def _hint(raw: dict[str, Any], key: str, value: str, keys: Sequence[str]) -> str:
    """Return the key that is meant, or the valid keys next to an unknown key and the nearest."""
    *groups, last = key.split(".")
    group = get_at(raw, groups)
    is_near = groups and isinstance(group, dict) and did_you_mean(last, map(str, group))
    if not is_near and (habit := usage(key, value)):
        return habit
    if not isinstance(group, dict):
        return f"there is no {'.'.join(groups)!r}{did_you_mean(key, keys)}"
    siblings = [str(name) for name in group]
    same_name = [candidate for candidate in keys if candidate.rpartition(".")[2] == last]
    close = did_you_mean(last, siblings)
    close = close or (f"; did you mean {same_name[0]!r}?" if same_name else "")
    add = f"; to add an argument use +{key}=..." if "_target_" in siblings else ""
    return f"{'.'.join(groups) or 'the configuration'} has: {join_choices(siblings)}{close}{add}"


def _dotted_keys(group: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield every key of a group, nested ones as `outer.inner`."""
    for name, child in group.items():
        yield f"{prefix}{name}"
        if isinstance(child, dict):
            yield from _dotted_keys(child, f"{prefix}{name}.")


def _as_issue(error: HydraException) -> ConfigIssue:
    reasons = [str(error)] if error.__cause__ is None else [str(error), str(error.__cause__)]
    missing = [
        option
        for option in EXTRA_BY_OPTION
        if re.search(f"Could not (find|load) '{option}'", " ".join(reasons))
    ]
    if missing:
        group, _, option = missing[0].rpartition("/")
        install = f'pip install "torch-experiment-app[{EXTRA_BY_OPTION[missing[0]]}]"'
        return ConfigIssue(group, f"={option} is not installed: {install}")
    message = " ".join(" ".join(reasons).split())
    if match := re.search(SEVERAL_VALUES, message):
        key, values = match[1], match[2]
        problem = (
            f"={values} has several values; add -m to run one job for each, or type "
            f"{key}=[{values}] for a list, \"{key}='{values}'\" for a text"
        )
        return ConfigIssue(key, problem)
    if match := re.search(r"Cannot find primary config '([^']+)'", message):
        return ConfigIssue("--config-name", f"={match[1]!r} does not exist; it is usually left out")
    if match := re.search(NO_OPTION, message):
        group, option, options = match[1], match[2], match[3].split()
        allowed = f"{join_choices(options)}{did_you_mean(option, options)}"
        return ConfigIssue(group, f"={option!r} does not exist; allowed: {allowed}")
    return ConfigIssue("", message)
