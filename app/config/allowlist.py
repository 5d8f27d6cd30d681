"""The classes and functions that a `_target_` may name: public components of known kinds.

A component is offered by a module listed here, or by a module in one of our own packages; nothing
else is imported. Whether it is allowed follows from what it is, not from its name alone.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import pkgutil
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeGuard, get_args, get_origin, get_type_hints

from app.runtime.errors import UserError, did_you_mean

TARGET, PARTIAL, POSITIONAL = "_target_", "_partial_", "_args_"
TRUSTED_TARGETS_VARIABLE = "APP_TRUSTED_TARGETS"
Target = Callable[..., Any]

METRIC_DOMAINS = (
    *("classification", "clustering", "detection", "image", "nominal", "regression"),
    *("retrieval", "segmentation", "shape", "wrappers"),
)
# The public subclasses in these modules.
LIBRARY_CLASSES = {
    "torch.nn": ("torch.nn.Module",),
    "torch.optim": ("torch.optim.Optimizer",),
    "torch.optim.lr_scheduler": ("torch.optim.lr_scheduler.LRScheduler",),
    "torch.optim.swa_utils": ("torch.optim.lr_scheduler.LRScheduler",),
    "torchmetrics": ("torchmetrics.Metric", "torchmetrics.MetricCollection"),
    **{f"torchmetrics.{domain}": ("torchmetrics.Metric",) for domain in METRIC_DOMAINS},
    "torchvision.transforms.v2": ("torchvision.transforms.v2.Transform", "enum.Enum"),
    "optuna.samplers": ("optuna.samplers.BaseSampler",),
    "optuna.pruners": ("optuna.pruners.BasePruner",),
    "hydra.experimental.callbacks": ("hydra.experimental.callback.Callback",),
}
EXCLUDED_CLASSES = (
    *("torch.nn.ParameterDict", "torch.nn.ParameterList"),  # would set attributes of any name
    # These download, as all with a `feature_network`; app.metrics.images has FID, KID and LPIPS.
    "torchmetrics.SacreBLEUScore",
    "torchmetrics.image.ARNIQA",
    "torchmetrics.image.DeepImageStructureAndTextureSimilarity",
)
LOSS_FUNCTIONS = "torch.nn.functional"  # the functions that have a reduction
MODELS = (  # the functions that torchvision has registered as builders of models
    "torchvision.models",
    *(f"torchvision.models.{task}" for task in ("detection", "optical_flow", "segmentation")),
    "torchvision.models.video",
)
DATASETS = "torchvision.datasets"
# These read neither pickles nor images of any format, which could start a program.
DATASET_CLASSES = (
    *("EMNIST", "FER2013", "FakeData", "FashionMNIST", "KMNIST", "MNIST", "MovingMNIST"),
    *("QMNIST", "SEMEION", "STL10", "SVHN", "USPS"),
)
LIBRARY_MODULES = (*LIBRARY_CLASSES, LOSS_FUNCTIONS, *MODELS, DATASETS)
# In the modules of our packages: the subclasses, and the functions that return an instance.
OWN_PACKAGES = {
    "app.callbacks": ("app.training.events.Callback",),
    "app.data": ("torch.nn.Module", "torch.utils.data.Dataset"),
    "app.losses": ("torch.nn.Module",),
    "app.metrics": ("torchmetrics.Metric",),
    "app.models": ("torch.nn.Module",),
    "app.training": ("app.training.task.Task",),
    "app.training.optim": (
        "app.training.optim.weight_averaging.WeightAveraging",
        "torch.optim.lr_scheduler.LRScheduler",
    ),
}
OWN_CLASSES = (  # that derive from nothing
    "app.data.mix.MixUpCutMix",
    "app.data.sampling.BalancedClasses",
    "app.data.sampling.ClassWeights",
    "app.data.sampling.SampleWeights",
    "app.data.windows.PatchInference",
    "app.losses.weighted_sum.Term",
    "app.losses.weights.LinearSchedule",
    "app.losses.weights.StepSchedule",
    "app.metrics.output_metric.OutputMetric",
)
ALLOWED = (
    "components of this program, of torch.nn, torch.optim, torchmetrics, torchvision.models and "
    "torchvision.transforms.v2, losses of torch.nn.functional, some of torchvision.datasets"
)


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
    """Return whether a value is a name such as torch.optim.AdamW, with nothing internal."""
    if not isinstance(name, str) or ".__" in name:
        return False
    return all(part.isidentifier() for part in name.split("."))


def is_allowed(name: object, trusted: Sequence[str] = ()) -> bool:
    """Return whether `locate` may import the module of this name, judged by the name alone."""
    if not is_dotted_name(name):
        return False
    module = name.rpartition(".")[0]
    package = module.rpartition(".")[0]
    return is_trusted(name, trusted) or module in LIBRARY_MODULES or package in OWN_PACKAGES


def locate(name: object, trusted: Sequence[str] = ()) -> Target:
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
    if is_trusted(name, trusted):
        return _import_trusted(name)
    if not is_allowed(name):
        raise TargetError(f"{name!r} is not allowed; allowed: {ALLOWED}{_same_elsewhere(name)}")
    module, _, attribute = name.rpartition(".")
    targets = allowed_targets(module)
    if attribute in targets:
        return targets[attribute]
    if hasattr(sys.modules[module], attribute):
        problem = "is not allowed: it is not one of the components that are known to be safe"
        raise TargetError(f"{name!r} {problem}; trusted_targets=[{name}] allows it")
    raise TargetError(f"{name!r} does not exist{did_you_mean(attribute, targets)}")


@functools.cache
def allowed_targets(module: str) -> Mapping[str, Target]:
    """Return the components of a module by name, for any module that `is_allowed` imports.

    Raises:
        TargetError: The module cannot be imported.
    """
    imported = _import_module(module, module)
    names = getattr(imported, "__all__", None) or list(vars(imported))
    public = {name: getattr(imported, name) for name in names if not name.startswith("_")}
    components = {
        name: target
        for name, target in public.items()
        if callable(target) and _is_component(module, name, target)
    }
    if module in MODELS:
        return {name: _without_weights(builder) for name, builder in components.items()}
    return components


def _without_weights(builder: Target) -> Target:
    """Return a builder of torchvision that reads no pretrained weights, also not by default.

    torch.hub unpickles them, and does not check the hash of a file that is already on disk.
    """
    none = {name: None for name in signature_parameters(builder) if name.startswith("weights")}

    @functools.wraps(builder)
    def build(**arguments: Any) -> Any:
        if given := {name: arguments[name] for name in none if arguments.get(name) is not None}:
            raise UserError(f"{given} is not available here; use model=torchvision")
        return builder(**arguments | none)

    return build


def _is_component(module: str, name: str, target: Target) -> bool:
    full_name = f"{module}.{name}"
    if module in LIBRARY_CLASSES:
        is_excluded = full_name in EXCLUDED_CLASSES or hasattr(target, "feature_network")
        return _derives(target, LIBRARY_CLASSES[module]) and not is_excluded
    if module in MODELS:
        models: Any = importlib.import_module("torchvision.models")
        return name in models.list_models(importlib.import_module(module))
    if module == LOSS_FUNCTIONS:
        return "reduction" in signature_parameters(target)
    if module == DATASETS:
        return name in DATASET_CLASSES
    bases = OWN_PACKAGES[module.rpartition(".")[0]]
    is_defined_here = f"{target.__module__}.".startswith(f"{module}.")  # or below, in a package
    return is_defined_here and (full_name in OWN_CLASSES or _derives(target, bases))


def _derives(target: Target, bases: Iterable[str]) -> bool:
    """Return whether a class derives from one of the bases, or a function of ours returns one."""
    kinds: list[Any] = [target]
    if inspect.isfunction(target) and target.__module__.startswith("app."):
        with suppress(NameError):  # a type that is imported for type checkers only
            returned = get_type_hints(target).get("return")
            members = get_args(returned) if isinstance(returned, types.UnionType) else [returned]
            kinds = [get_origin(member) or member for member in members]
    parents = tuple(map(pkgutil.resolve_name, bases))
    return any(inspect.isclass(kind) and issubclass(kind, parents) for kind in kinds)


def signature_parameters(target: Target) -> dict[str, inspect.Parameter]:
    """Parameters of a class or function by name; empty if Python cannot determine them."""
    try:
        return dict(inspect.signature(target, eval_str=False).parameters)
    except ValueError:
        return {}


def _same_elsewhere(name: str) -> str:
    """Return a hint to the component of the same name in another module of the library."""
    library, attribute = name.partition(".")[0], name.rpartition(".")[2]
    for module in LIBRARY_MODULES:
        if module.partition(".")[0] == library and attribute in allowed_targets(module):
            return f"; did you mean '{module}.{attribute}'?"
    return ""


def _import_trusted(name: str) -> Target:
    """Import a class or function, or a method of a class; never what a module has imported."""
    owner, _, attribute = name.rpartition(".")
    module, _, class_name = owner.rpartition(".")
    try:
        found = getattr(_import_module(owner, name), attribute, None)
    except TargetError:
        cls = getattr(_import_module(module, name), class_name, None) if module else None
        if not inspect.isclass(cls):
            raise
        found = getattr(cls, attribute, None)
    if not callable(found):
        raise TargetError(f"{name!r} is not a class or function")
    target: Target = found
    return target


def _import_module(module: str, name: str) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a module's own code may raise anything
        parent, _, missing = module.rpartition(".")
        is_missing = parent and isinstance(error, ModuleNotFoundError) and error.name == module
        close = did_you_mean(missing, _submodules(parent)) if is_missing else ""
        reason = f"{type(error).__name__}: {error}"
        raise TargetError(f"{name!r} cannot be imported: {reason}{close}") from error


def _submodules(package: str) -> list[str]:
    path = getattr(sys.modules[package], "__path__", ())
    return [found.name for found in pkgutil.iter_modules(path)]


def trust_hint(names: Iterable[str]) -> str:
    """Return how to allow targets: by their package, or a foreign one by its own name."""
    foreign = {*sys.stdlib_module_names, *(m.partition(".")[0] for m in LIBRARY_MODULES), "app"}
    roots = {name: name.partition(".")[0] for name in names}
    trusted = sorted({name if root in foreign else root for name, root in roots.items()})
    return f"if you trust that code, add trusted_targets=[{','.join(trusted)}] to the command line"
