"""Apply today's overrides to the saved configuration of a run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from app.config.resolve import NOW, Plain, get_by_path, resolve, shorten, unresolved
from app.config.schema import Config
from app.config.secrets import PUBLIC_KEYS
from app.config.types import hints, only_dataclass
from app.config.validate import has_auto
from app.runtime.errors import ConfigError, ConfigIssue

ALL_OVER = ("experiment", "debug", "local")  # groups that set keys anywhere
FIXED = ("model.", "data.split.")
LEARNS_WITH = ("average", "task.", "loss.")
LENGTH = (
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.accumulate_grad_batches",
    "trainer.limit_train_batches",
    "data.batch_size",
)


def apply_overrides_to_saved(
    saved: Plain,
    template: DictConfig,
    today: DictConfig,
    overrides: Sequence[Override],
    resumes: bool = False,
) -> tuple[Plain, DictConfig, list[str]]:
    """A saved run's configuration with what was typed now laid over it.

    What the typed keys do to others is found out on the run's own template, so that a changed
    `data.path` reaches the source that is made of it.

    Args:
        saved: The run's configuration, resolved.
        template: The same with its interpolations.
        today: What was composed now.
        overrides: What was typed.
        resumes: Its training goes on; then what it learns with cannot be changed either.

    Returns:
        The configuration, its template, and a line for each difference to the saved one.

    Raises:
        ConfigError: An override that would make it another model or another split.
    """
    typed, mistakes = copy.deepcopy(template), []
    raw = OmegaConf.to_container(today, resolve=False)
    for override in overrides:
        key = override.package or override.key_or_group
        if key in ALL_OVER and resumes:
            typed = unresolved(today)  # the same command gives the same
            break
        if key in ALL_OVER:
            problem = " sets keys all over and cannot be laid over a saved run; type the keys"
            mistakes.append(ConfigIssue(key, problem))
        elif key.partition(".")[0] not in NOW and not override.is_hydra_override():
            _lay(typed, key, get_by_path(raw, key), override.is_delete())
    if resumes and get_by_path(
        saved, "trainer.batch_size_finder"
    ):  # what was typed was where to begin
        OmegaConf.update(typed, "data.batch_size", saved["data"]["batch_size"])
    (before, _), (after, _), (now, _) = resolve(template), resolve(typed), resolve(today)
    differences: list[str] = []
    merged = _merged(saved, before, after, "", differences)
    options = ("predict.", "export.", "find.")  # of this command, not of what was trained
    differences = [line for line in differences if not line.startswith(options)]
    names = FIXED + LEARNS_WITH * resumes
    fixed = [line for line in differences if line.startswith(names) or _is_other_optimizer(line)]
    mistakes += [
        ConfigIssue(line, ": the run was trained so, and cannot be changed") for line in fixed
    ]
    if mistakes:
        raise ConfigError(mistakes)
    filled = _filled(merged, now, Config, "", differences)
    words = {override.key_or_group for override in overrides}
    kept = [name for name in PUBLIC_KEYS if resumes and name in saved and name not in words]
    filled |= {name: now[name] for name in NOW if name not in kept}
    return filled, typed, differences


def _is_other_optimizer(line: str) -> bool:
    return line.startswith("optimizer.") and "_target_: " in line


def optimizer_changed(saved: Plain, now: Plain) -> bool:
    """Whether a run that goes on learns by another rate or schedule from now on."""
    by_length = has_auto(now["scheduler"]["lr_scheduler"])
    keys = ("optimizer", "scheduler", *(LENGTH * by_length))
    return any(get_by_path(saved, key) != get_by_path(now, key) for key in keys)


def replace_value(
    plain: Plain, template: DictConfig, key: str, value: object
) -> tuple[Plain, DictConfig]:
    """A configuration and its template with another value, and all that is made of it."""
    changed = copy.deepcopy(template)
    OmegaConf.update(changed, key, value)
    (before, _), (after, _) = resolve(template), resolve(changed)
    merged: Plain = _merged(plain, before, after, "", [])
    return merged, changed


def _filled(saved: Plain, now: Plain, cls: type, key: str, differences: list[str]) -> Plain:
    """`saved`, with today's values of keys that did not exist when it was saved."""
    filled = dict(saved)
    for name, expected in hints(cls).items():
        inner, part = f"{key}{name}", only_dataclass(expected)
        if name not in saved and name in now and name not in NOW:
            differences.append(f"{inner}: not yet known when it was saved -> {shorten(now[name])}")
            filled[name] = now[name]
        elif part and isinstance(saved.get(name), dict) and isinstance(now.get(name), dict):
            filled[name] = _filled(saved[name], now[name], part, f"{inner}.", differences)
    return filled


def _lay(config: DictConfig, key: str, value: Any, delete: bool) -> None:
    if not delete:
        try:
            OmegaConf.update(config, key, value, merge=False, force_add=True)
        except (ValueError, IndexError, OmegaConfBaseException) as error:
            problem = f" has no place in the saved run: {str(error).splitlines()[0]}"
            raise ConfigError([ConfigIssue(key, problem)]) from error
        return
    parent = OmegaConf.select(config, key.rpartition(".")[0])
    if isinstance(parent, DictConfig):
        parent.pop(key.rpartition(".")[2], None)


def _merged(saved: Any, before: Any, after: Any, key: str, differences: list[str]) -> Any:
    """`saved`, changed wherever `after` is unlike `before`."""
    if not (isinstance(before, dict) and isinstance(after, dict) and isinstance(saved, dict)):
        if before == after or saved == after:
            return saved
        differences.append(f"{key}: {shorten(saved)} -> {shorten(after)}")
        return after
    merged = dict(saved)
    for name in before.keys() | after.keys():
        inner = f"{key}.{name}" if key else name
        if name not in after:
            differences.append(f"{inner}: {shorten(merged.pop(name, None))} -> removed")
        else:
            parts = (saved.get(name), before.get(name), after[name])
            merged[name] = _merged(*parts, inner, differences)
    return merged


def difference(before: Any, now: Any, key: str) -> str | None:
    """The first difference of two nodes at `key`, as `key: before -> now`."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = dict.fromkeys([*before, *now])
        inner = (difference(before.get(n), now.get(n), f"{key}.{n}") for n in names)
        return next(filter(None, inner), None)
    return None if before == now else f"{key}: {shorten(before)} -> {shorten(now)}"
