"""Apply command-line overrides to the saved configuration of a run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from app.config.resolve import (
    PER_COMMAND_KEYS,
    PlainConfig,
    get_by_path,
    resolve,
    shorten,
    unresolved,
)
from app.config.schema import Config
from app.config.secrets import PUBLIC_KEYS
from app.config.types import field_types, only_dataclass
from app.config.validate import has_auto
from app.runtime.errors import ConfigError, ConfigIssue

MULTI_KEY_GROUPS = ("experiment", "debug", "local")  # groups whose files set keys anywhere
FIXED_KEYS = ("model.", "data.split.")
FIXED_ON_RESUME = ("average", "task.", "loss.")
SCHEDULE_LENGTH_KEYS = (  # determine the number of optimizer steps
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.accumulate_grad_batches",
    "trainer.limit_train_batches",
    "data.batch_size",
)


def apply_overrides_to_saved(
    saved: PlainConfig,
    template: DictConfig,
    current: DictConfig,
    overrides: Sequence[Override],
    resumes: bool = False,
) -> tuple[PlainConfig, DictConfig, list[str]]:
    """Apply overrides on top of a saved run's configuration.

    Overrides are applied to the run's own template, so that a changed `data.path` also changes
    the data source that is interpolated from it.

    Args:
        saved: Resolved configuration of the run.
        template: The same with its interpolations.
        current: Configuration composed from the current command line.
        overrides: Overrides from the command line.
        resumes: Whether training continues; if so, task, losses and averaging are fixed as well.

    Returns:
        The configuration, its template, and one line for each difference from the saved one.

    Raises:
        ConfigError: An override would change the model, the data split or what is fixed on resume.
    """
    changed, issues = copy.deepcopy(template), []
    raw = OmegaConf.to_container(current, resolve=False)
    for override in overrides:
        key = override.package or override.key_or_group
        if key in MULTI_KEY_GROUPS and resumes:
            changed = unresolved(current)  # all keys come from the current command line
            break
        if key in MULTI_KEY_GROUPS:
            problem = (
                " sets keys of several groups and cannot be applied to a saved run; "
                "override the keys themselves"
            )
            issues.append(ConfigIssue(key, problem))
        elif key.partition(".")[0] not in PER_COMMAND_KEYS and not override.is_hydra_override():
            _set_or_delete(changed, key, get_by_path(raw, key), override.is_delete())
    if resumes and get_by_path(saved, "trainer.batch_size_finder"):
        # A batch size on the command line is where the search began; the saved one is its result.
        OmegaConf.update(changed, "data.batch_size", saved["data"]["batch_size"])
    (before, _), (after, _), (now, _) = resolve(template), resolve(changed), resolve(current)
    differences: list[str] = []
    merged = _merge_changes(saved, before, after, "", differences)
    mode_options = ("predict.", "export.", "find.")  # settings of other modes than training
    differences = [line for line in differences if not line.startswith(mode_options)]
    fixed_keys = FIXED_KEYS + FIXED_ON_RESUME * resumes
    issues += [
        ConfigIssue(line, ": cannot be changed; the run was trained with the saved value")
        for line in differences
        if line.startswith(fixed_keys) or _is_other_optimizer(line)
    ]
    if issues:
        raise ConfigError(issues)
    filled = _fill_new_keys(merged, now, Config, "", differences)
    overridden = {override.key_or_group for override in overrides}
    kept = [name for name in PUBLIC_KEYS if resumes and name in saved and name not in overridden]
    filled |= {name: now[name] for name in PER_COMMAND_KEYS if name not in kept}
    return filled, changed, differences


def _set_or_delete(config: DictConfig, key: str, value: Any, delete: bool) -> None:
    if not delete:
        try:
            OmegaConf.update(config, key, value, merge=False, force_add=True)
        except (ValueError, IndexError, OmegaConfBaseException) as error:
            problem = f" cannot be set in the saved run: {str(error).splitlines()[0]}"
            raise ConfigError([ConfigIssue(key, problem)]) from error
        return
    parent = OmegaConf.select(config, key.rpartition(".")[0])
    if isinstance(parent, DictConfig):
        parent.pop(key.rpartition(".")[2], None)


def _merge_changes(saved: Any, before: Any, after: Any, key: str, differences: list[str]) -> Any:
    """Return `saved`, changed wherever `after` differs from `before`."""
    if not (isinstance(before, dict) and isinstance(after, dict) and isinstance(saved, dict)):
        if before == after or saved == after:
            return saved
        differences.append(f"{key}: {shorten(saved)} -> {shorten(after)}")
        return after
    merged = dict(saved)
    for name in before.keys() | after.keys():
        child_key = f"{key}.{name}" if key else name
        if name not in after:
            differences.append(f"{child_key}: {shorten(merged.pop(name, None))} -> removed")
        else:
            children = (saved.get(name), before.get(name), after[name])
            merged[name] = _merge_changes(*children, child_key, differences)
    return merged


def _is_other_optimizer(line: str) -> bool:
    return line.startswith("optimizer.") and "_target_: " in line


def _fill_new_keys(
    saved: PlainConfig, now: PlainConfig, cls: type, key: str, differences: list[str]
) -> PlainConfig:
    """Return `saved` with the current values of keys that did not exist when it was saved."""
    filled = dict(saved)
    for name, expected in field_types(cls).items():
        child_key, child_cls = f"{key}{name}", only_dataclass(expected)
        if name not in saved and name in now and name not in PER_COMMAND_KEYS:
            value = shorten(now[name])
            differences.append(f"{child_key}: did not exist when the run was saved -> {value}")
            filled[name] = now[name]
        elif child_cls and isinstance(saved.get(name), dict) and isinstance(now.get(name), dict):
            filled[name] = _fill_new_keys(
                saved[name], now[name], child_cls, f"{child_key}.", differences
            )
    return filled


def optimizer_changed(saved: PlainConfig, now: PlainConfig) -> bool:
    """Return whether a resumed run continues with another optimizer or learning rate schedule."""
    depends_on_length = has_auto(now["scheduler"]["lr_scheduler"])
    keys = ("optimizer", "scheduler", *(SCHEDULE_LENGTH_KEYS * depends_on_length))
    return any(get_by_path(saved, key) != get_by_path(now, key) for key in keys)


def replace_value(
    plain: PlainConfig, template: DictConfig, key: str, value: object
) -> tuple[PlainConfig, DictConfig]:
    """Change one value in a configuration and its template, and all that is interpolated from it.

    Returns:
        The changed configuration and template.
    """
    changed = copy.deepcopy(template)
    OmegaConf.update(changed, key, value)
    (before, _), (after, _) = resolve(template), resolve(changed)
    merged: PlainConfig = _merge_changes(plain, before, after, "", [])
    return merged, changed


def first_difference(before: Any, now: Any, key: str) -> str | None:
    """Return the first difference of two nodes as `key: before -> now`, or None."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = dict.fromkeys([*before, *now])
        inner = (first_difference(before.get(n), now.get(n), f"{key}.{n}") for n in names)
        return next(filter(None, inner), None)
    return None if before == now else f"{key}: {shorten(before)} -> {shorten(now)}"
