"""Allow-list of the classes and functions that a `_target_` may name."""

from __future__ import annotations

import importlib
import inspect
import os
import types
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

from app.config.nested import dotted, iter_leaves
from app.runtime.errors import UserError, did_you_mean

TARGET, PARTIAL, POSITIONAL = "_target_", "_partial_", "_args_"
TRUSTED_TARGETS_VARIABLE = "APP_TRUSTED_TARGETS"
APP_PREFIXES = (
    "app.training.optim.weight_averaging.",
    "app.callbacks.",
    "app.data.",
    "app.losses.",
    "app.metrics.",
    "app.models.",
    "app.training.optim.chain.",
    "app.training.supervised.",
    "app.training.task.",
    "app.training.dcgan_task.",
)
LIBRARY_PREFIXES = (
    "torch.nn.",
    "torch.optim.",
    "torchmetrics.",
    "torchvision.datasets.",
    "torchvision.models.",
    "torchvision.transforms.",
)
# Below the allowed prefixes, but these run code or write files that their arguments name.
DENIED_PREFIXES = (
    "app.callbacks.prediction_files.",  # writes files to any folder
    "app.data.datamodule.",  # builds components from nodes that it is given
    "app.data.torchvision_sets.download_dataset",  # downloads any URL to any path
    "torchmetrics.functional.multimodal.clip_score.",  # runs code that comes with a model
    "torchmetrics.multimodal.clip_score.",
    "torchvision.datasets.lsun.",  # unpickles a file from the working directory
    "torchvision.datasets.utils.",  # downloads and unpacks any URL to any path
)
# What Hydra's sampler and pruner nodes of an Optuna sweep may name.
SAMPLER_PREFIX, PRUNER_PREFIX = "optuna.samplers", "optuna.pruners"
# Libraries offer classes; functions are allowed only below these prefixes.
FUNCTION_PREFIXES = ("torch.nn.functional.", "torchmetrics.functional.", "torchvision.models.")


class TargetError(UserError):
    """A `_target_` is not allowed or cannot be imported."""


def trusted_from_environment() -> list[str]:
    """Module names in the environment variable APP_TRUSTED_TARGETS, separated by commas."""
    value = os.environ.get(TRUSTED_TARGETS_VARIABLE, "")
    return [name.strip() for name in value.split(",") if name.strip()]


def is_trusted(name: str, trusted: Sequence[str]) -> bool:
    """Return whether the user trusts this name, or a module that contains it."""
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in trusted)


def is_dotted_name(name: object) -> TypeGuard[str]:
    """Return whether a value is a name such as torch.optim.AdamW."""
    return isinstance(name, str) and all(part.isidentifier() for part in name.split("."))


def is_allowed(name: object, trusted: Sequence[str] = ()) -> bool:
    """Return whether `locate` may import this name, judged by the name alone."""
    if not is_dotted_name(name):
        return False
    return is_trusted(name, trusted) or (
        name.startswith(APP_PREFIXES + LIBRARY_PREFIXES)
        and not any(part.startswith("_") for part in name.split("."))
    )


def locate(name: object, trusted: Sequence[str] = ()) -> Callable[..., Any]:
    """Import a class or function by its dotted name.

    Args:
        name: For instance `torch.optim.AdamW`.
        trusted: Modules outside this program that the user trusts by name.

    Raises:
        TargetError: The name is not allowed or does not exist. Modules that are not allowed are
            not imported.
    """
    if not is_dotted_name(name):
        raise TargetError(f"{name!r} is not a dotted name such as torch.optim.AdamW")
    if not is_allowed(name, trusted):
        _raise_not_allowed(name)
    target: Callable[..., Any] = _import_object(name)
    if not callable(target):
        raise TargetError(f"{name!r} is not a class or function")
    if not is_trusted(name, trusted):
        _check_home(name, target)
    return target


def _raise_not_allowed(name: str) -> None:
    allowed = ", ".join(f"{prefix}*" for prefix in APP_PREFIXES + LIBRARY_PREFIXES)
    module = name.rpartition(".")[0] or name
    raise TargetError(
        f"{name!r} is not allowed; allowed: {allowed}; if the code is yours, "
        f"add trusted_targets=[{module}] to the command line"
    )


def _import_object(name: str) -> Any:
    first, *rest = name.split(".")
    found: Any = _import_module(first, name)
    for part in rest:
        parent = found
        if not hasattr(parent, part) and isinstance(parent, types.ModuleType):
            found = _import_module(f"{parent.__name__}.{part}", name)
        else:
            found = getattr(parent, part, None)
        are_modules = isinstance(found, types.ModuleType) and isinstance(parent, types.ModuleType)
        if are_modules and not found.__name__.startswith(f"{parent.__name__}."):
            raise TargetError(f"{name!r} is not allowed: it reaches into {found.__name__!r}")
    return found


def _import_module(module: str, name: str) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise TargetError(f"{name!r} cannot be imported: {error}") from error
        parent, _, missing = module.rpartition(".")
        names = dir(importlib.import_module(parent)) if parent else []
        close = did_you_mean(missing, [n for n in names if not n.startswith("_")])
        raise TargetError(
            f"{name!r} cannot be imported: no {missing!r} in {parent!r}{close}"
        ) from error
    except Exception as error:  # a module's own code may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise TargetError(f"{name!r} cannot be imported: {reason}") from error


def _check_home(name: str, target: Callable[..., Any]) -> None:
    """Check the module that defines the target: an allowed module may only re-export it."""
    home = f"{getattr(target, '__module__', None)}."
    if f"{home}{getattr(target, '__qualname__', '')}".startswith(DENIED_PREFIXES):
        raise TargetError(
            f"{name!r} is not allowed: it can run code or write files that its arguments name; "
            f"trusted_targets=[{name}] on the command line allows it"
        )
    if name.startswith("torch.nn.functional.") and inspect.isbuiltin(target):
        return  # some of these are defined in torch itself, such as cosine_similarity
    is_app = name.startswith(APP_PREFIXES)
    homes = APP_PREFIXES if is_app else (*LIBRARY_PREFIXES, "torch._C._nn.")
    if not home.startswith(homes):
        raise TargetError(f"{name!r} is not allowed: it is defined in {home[:-1]!r}")
    if not inspect.isclass(target) and not name.startswith(APP_PREFIXES + FUNCTION_PREFIXES):
        raise TargetError(f"{name!r} is not allowed: only classes of that module are allowed")


def check_targets_allowed(source: str, config: dict[str, Any], trusted: Sequence[str]) -> None:
    """Check that a saved configuration imports only code that is allowed or trusted.

    Args:
        source: Checkpoint or folder that contains the configuration, for errors.
        config: Resolved configuration. Every `_target_` in it is checked, used or not.
        trusted: Modules that the user trusts by name.

    Raises:
        UserError: Lists every target that is neither allowed nor trusted.
    """
    found = sorted(
        (dotted(path), str(name))
        for path, name in iter_leaves(config)
        if path[-1] == TARGET and name is not None and not is_allowed(name, trusted)
    )
    if not found:
        return
    lines = [f"  {key}={name!r}" for key, name in found]
    modules = ",".join(sorted({name.rpartition(".")[0] or name for _, name in found}))
    raise UserError(
        "\n".join(
            [
                f"{source} references code outside this program; none of it was imported:",
                *lines,
                f"if you trust that code, add trusted_targets=[{modules}] to the command line",
            ]
        )
    )
