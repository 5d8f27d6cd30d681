"""Apply command-line overrides to the saved configuration of a run."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from hydra.core.override_parser.types import Override

from app.config.nested import dotted, get_at, shorten
from app.config.optimizers import optimizer_nodes
from app.config.resolve import PER_COMMAND_KEYS, PlainConfig, get_by_path
from app.config.saved import SavedConfig, resolve_saved
from app.config.schema import AUTO, DATA_FACTS, Change, Config, Job
from app.config.secrets import PUBLIC_KEYS, reveal_config
from app.config.types import iter_fields
from app.config.validate import Overridden, has_auto
from app.runtime.errors import ConfigError, ConfigIssue

MULTI_KEY_GROUPS = ("experiment", "debug", "local", "_global_")  # their files set keys anywhere
FIXED_KEYS = ("model", "init", "teacher", "data.split", "data.folds", "data.fold")
FIXED_ON_RESUME = ("average", "task", "loss")
OPTIONS_OF_OTHER_MODES = ("predict", "export", "find")
SCHEDULE_LENGTH_KEYS = (  # determine the number of optimizer steps
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.accumulate_grad_batches",
    "trainer.limit_train_batches",
    "trainer.overfit_batches",
    "trainer.fast_dev_run",
    "data.batch_size",
    "data.drop_last",
)


def apply_overrides_to_saved(
    saved: SavedConfig, now: SavedConfig, overrides: Sequence[Override], resumes: bool = False
) -> tuple[SavedConfig, list[Change]]:
    """Apply overrides on top of a saved run's configuration.

    A changed `data.path` also changes the data source that refers to it.

    Args:
        saved: Configuration of the run.
        now: Configuration composed from the current command line.
        overrides: Overrides from the command line.
        resumes: Whether training continues; if so, task, losses and averaging are fixed as well.

    Returns:
        The configuration, and its differences from the saved one.

    Raises:
        ConfigError: An override would change the model, the data split or what is fixed on resume.
    """
    changed = _with_overrides(saved, now, overrides, resumes)
    _keep_data_facts(changed, saved)
    changes = [
        change
        for change in iter_changes(resolve_saved(saved), resolve_saved(changed))
        if not change.is_below(*PER_COMMAND_KEYS, *OPTIONS_OF_OTHER_MODES)
    ]
    fixed_keys = FIXED_KEYS + FIXED_ON_RESUME * resumes
    issues = [
        ConfigIssue(f"{change}", ": cannot be changed; the run was trained with the saved value")
        for change in changes
        if change.is_below(*fixed_keys) or _is_other_optimizer(change)
    ]
    if issues:
        raise ConfigError(issues)
    overridden = {override.key_or_group for override in overrides}
    kept = [name for name in PUBLIC_KEYS if resumes and name in saved and name not in overridden]
    changed |= {n: now[n] for n in PER_COMMAND_KEYS if n in now and n not in kept}
    return changed, [*changes, *_add_new_keys(changed, now)]


def _with_overrides(
    saved: SavedConfig, now: SavedConfig, overrides: Sequence[Override], resumes: bool
) -> SavedConfig:
    changed, issues = copy.deepcopy(saved), []
    for override in overrides:
        key = overridden_key(override)
        if key in MULTI_KEY_GROUPS and resumes:
            changed = copy.deepcopy(now)  # all keys come from the current command line
            break
        if key in MULTI_KEY_GROUPS:
            problem = (
                " sets keys of several groups and cannot be applied to a saved run; "
                "override the keys themselves"
            )
            issues.append(ConfigIssue(key, problem))
        elif key.partition(".")[0] not in PER_COMMAND_KEYS and not override.is_hydra_override():
            _apply_override(changed, now, key)
    if issues:
        raise ConfigError(issues)
    if resumes and get_by_path(saved, "trainer.batch_size_finder"):
        # A batch size on the command line is where the search began; the saved one is its result.
        _apply_override(changed, saved, "data.batch_size")
    return changed


def overridden_key(override: Override) -> str:
    """Return the key that an override sets, or that of the group that it chooses."""
    key = (override.package or override.key_or_group).replace("/", ".")
    return "callbacks" if key == "logger" else key


def find_overridden(overrides: Sequence[Override], has_errors: bool) -> Overridden:
    """Return what overrides set; some of them set keys anywhere."""
    keys = [overridden_key(override) for override in overrides]
    is_anywhere = any(key in MULTI_KEY_GROUPS for key in keys)
    return Overridden([""] if is_anywhere else keys, has_errors)


def _keep_data_facts(changed: SavedConfig, saved: SavedConfig) -> None:
    """Prefer what the run knows about its data to `auto`; other data must match it."""
    data, known = changed.get("data"), saved.get("data")
    if isinstance(data, dict) and isinstance(known, dict):
        data.setdefault("class_names", None)  # today's would be the names of today's data
        data |= {
            name: known[name] for name in DATA_FACTS if data.get(name) == AUTO and name in known
        }


def _apply_override(changed: SavedConfig, now: SavedConfig, key: str) -> None:
    """Set a key to its current value, or remove it if it has none now."""
    *groups, last = key.split(".")
    for name in groups:
        if not isinstance(now.get(name), dict):  # an item of a list: take the whole list
            last = name
            break
        group = changed.setdefault(name, {})
        if not isinstance(group, dict):
            problem = f" cannot be set in the saved run: {name} is {shorten(group)}"
            raise ConfigError([ConfigIssue(key, problem)])
        changed, now = group, now[name]
    if last in now:
        changed[last] = now[last]
    else:
        changed.pop(last, None)


def _is_other_optimizer(change: Change) -> bool:
    return change.is_below("optimizer") and change.key.endswith("._target_")


def iter_changes(before: Any, after: Any, key: str = "") -> Iterator[Change]:
    """Yield the differences of two resolved configurations.

    Args:
        before: Value of the saved run.
        after: Value now.
        key: Key of both.
    """
    if not (isinstance(before, dict) and isinstance(after, dict)):
        if before != after:
            yield Change(key, shorten(before), shorten(after))
        return
    for name in dict.fromkeys([*before, *after]):
        child_key = f"{key}.{name}" if key else name
        if name in after:
            yield from iter_changes(before.get(name), after[name], child_key)
        else:
            yield Change(child_key, shorten(before[name]), "removed")


def _add_new_keys(saved: SavedConfig, now: SavedConfig) -> Iterator[Change]:
    """Add the keys that did not exist when the run was saved, with their current values."""
    for path in iter_fields(Config):
        *groups, last = path
        group, current = get_at(saved, groups), get_at(now, groups)
        if isinstance(group, dict) and isinstance(current, dict) and last in current.keys() - group:
            group[last] = current[last]
            value = shorten(current[last])
            yield Change(dotted(path), "did not exist when the run was saved", value)


def optimizer_changed(saved: PlainConfig, now: PlainConfig) -> bool:
    """Return whether a resumed run continues with another optimizer or learning rate schedule."""
    scheduler = now["scheduler"]
    has_share = isinstance(scheduler["warmup_steps"], float) or scheduler["warmup_epochs"]
    scales_lr = any(node.get("lr_base_size") for node in optimizer_nodes(now["optimizer"]).values())
    depends_on_length = has_share or scales_lr or has_auto(scheduler["lr_scheduler"])
    keys = ("optimizer", "scheduler", *(SCHEDULE_LENGTH_KEYS if depends_on_length else ()))
    # A key that did not exist when the run was saved is null.
    return any(first_difference(get_by_path(saved, k), get_by_path(now, k), k) for k in keys)


def replace_value(job: Job, key: str, value: object) -> Job:
    """Return the job with another value at a key, and at all keys that refer to it."""
    saved = copy.deepcopy(job.saved)
    *groups, last = key.split(".")
    get_at(saved, groups)[last] = value
    plain = resolve_saved(saved)
    return replace(job, config=reveal_config(plain), plain=plain, saved=saved)


def first_difference(before: Any, now: Any, key: str) -> Change | None:
    """Return the first difference of two nodes, or None."""
    return next(iter_changes(before, now, key), None)
