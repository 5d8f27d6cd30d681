"""What a `_target_` may name, and the object it names."""

from __future__ import annotations

import importlib
import inspect
import os
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from app.runtime.errors import UserError, nearest

# Parts of this program that a configuration may name, then the libraries it may name.
PARTS = (
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
LIBRARIES = (
    "torch.nn.",
    "torch.optim.",
    "torchmetrics.",
    "torchvision.datasets.",
    "torchvision.models.",
    "torchvision.transforms.",
)
# Offered by those, but they run or write what their arguments name.
DENIED = (
    "app.data.torchvision_sets.download_dataset",  # downloads anything to anywhere
    "torchmetrics.functional.multimodal.clip_score.",  # runs code that comes with a model
    "torchmetrics.multimodal.clip_score.",
    "torchvision.datasets.lsun.",  # unpickles a file of the working directory
    "torchvision.datasets.utils.",  # downloads and unpacks anything to anywhere
)
# In the libraries a class is a part; a function only where functions are what is offered.
FUNCTIONS = ("torch.nn.functional.", "torchmetrics.functional.", "torchvision.models.")
TRUST_VARIABLE = "APP_TRUSTED_TARGETS"


class TargetError(UserError):
    """A `_target_` that is not allowed or not there."""


def trusted_by_environment() -> list[str]:
    """The module names in the variable APP_TRUSTED_TARGETS, separated by commas."""
    return [name.strip() for name in os.environ.get(TRUST_VARIABLE, "").split(",") if name.strip()]


def is_trusted(name: str, trusted: Sequence[str]) -> bool:
    """Whether the user himself named it, or a module that holds it."""
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in trusted)


def is_allowed(name: object, trusted: Sequence[str] = ()) -> bool:
    """Whether the name alone allows that `locate` imports what it names."""
    if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
        return False
    return is_trusted(name, trusted) or (
        name.startswith(PARTS + LIBRARIES) and not any(p.startswith("_") for p in name.split("."))
    )


def locate(name: object, trusted: Sequence[str] = ()) -> Callable[..., Any]:
    """The class or function of that dotted name.

    Args:
        name: For instance `torch.optim.AdamW`.
        trusted: Modules outside this program that the user named himself.

    Raises:
        TargetError: It is not allowed, or not there. Nothing is imported that is not allowed.
    """
    if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
        raise TargetError(f"{name!r} is not a dotted name such as torch.optim.AdamW")
    if not is_allowed(name, trusted):
        _refuse_unknown(name)
    target: Callable[..., Any] = _walk(name)
    if not callable(target):
        raise TargetError(f"{name!r} is not a class or function")
    if not is_trusted(name, trusted):
        _refuse_reexported(name, target)
    return target


def _refuse_unknown(name: str) -> None:
    allowed = ", ".join(f"{prefix}*" for prefix in PARTS + LIBRARIES)
    module = name.rpartition(".")[0] or name
    raise TargetError(
        f"{name!r} is not allowed; allowed: {allowed}; if the code is yours, "
        f"add trusted_targets=[{module}] to the command line"
    )


def _refuse_reexported(name: str, target: Callable[..., Any]) -> None:
    """An allowed module may have imported something else: the home of the object counts."""
    home = f"{getattr(target, '__module__', None)}."
    if f"{home}{getattr(target, '__qualname__', '')}".startswith(DENIED):
        raise TargetError(
            f"{name!r} is not allowed: it can run code or write files that its arguments name; "
            f"trusted_targets=[{name}] on the command line allows it"
        )
    if name.startswith("torch.nn.functional.") and inspect.isbuiltin(target):
        return  # some of them live in torch itself, as cosine_similarity
    homes = PARTS if name.startswith(PARTS) else (*LIBRARIES, "torch._C._nn.")
    if not home.startswith(homes):
        raise TargetError(f"{name!r} is not allowed: it belongs to {home[:-1]!r}")
    if not inspect.isclass(target) and not name.startswith(PARTS + FUNCTIONS):
        raise TargetError(f"{name!r} is not allowed: only the classes of that module are")


def _walk(name: str) -> Any:
    first, *rest = name.split(".")
    found: Any = _module(first, name)
    for part in rest:
        parent = found
        if not hasattr(parent, part) and isinstance(parent, types.ModuleType):
            found = _module(f"{parent.__name__}.{part}", name)
        else:
            found = getattr(parent, part, None)
        borrowed = isinstance(found, types.ModuleType) and isinstance(parent, types.ModuleType)
        if borrowed and not found.__name__.startswith(f"{parent.__name__}."):
            raise TargetError(f"{name!r} is not allowed: it reaches into {found.__name__!r}")
    return found


def _module(module: str, name: str) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise TargetError(f"{name!r} does not import: {error}") from error
        parent, _, missing = module.rpartition(".")
        names = dir(importlib.import_module(parent)) if parent else []
        close = nearest(missing, [n for n in names if not n.startswith("_")])
        raise TargetError(
            f"{name!r} does not import: no {missing!r} in {parent!r}{close}"
        ) from error
    except Exception as error:  # whatever a module's own code raises
        reason = f"{type(error).__name__}: {error}"
        raise TargetError(f"{name!r} does not import: {reason}") from error


TARGET, PARTIAL, POSITIONAL = "_target_", "_partial_", "_args_"


def check_targets_allowed(source: str, config: dict[str, Any], trusted: Sequence[str]) -> None:
    """A saved configuration imports what the program offers, and what its user trusts by name.

    Args:
        source: The checkpoint or folder that it is from.
        config: Resolved; each place counts, whether something is built of it or not.
        trusted: Modules that the user named himself.

    Raises:
        UserError: All that it would import beside that.
    """
    found = {
        (key, str(name)) for key, name in _targets("", config) if not is_allowed(name, trusted)
    }
    if not found:
        return
    lines = [f"  {key}={name!r}" for key, name in sorted(found)]
    modules = sorted({name.rpartition(".")[0] or name for _, name in found})
    raise UserError(
        "\n".join(
            [
                f"{source} names code from outside this program; nothing of it was imported:",
                *lines,
                f"if you trust that code: trusted_targets=[{','.join(modules)}]",
            ]
        )
    )


def _targets(key: str, node: Any) -> Iterator[tuple[str, Any]]:
    left = [(key, node)]
    while left:
        key, node = left.pop()
        if isinstance(node, list):
            left += [(f"{key}.{index}", part) for index, part in enumerate(node)]
        elif isinstance(node, dict):
            left += [(f"{key}.{name}" if key else str(name), part) for name, part in node.items()]
            if TARGET in node and node[TARGET] is not None:
                yield (f"{key}.{TARGET}" if key else TARGET), node[TARGET]
