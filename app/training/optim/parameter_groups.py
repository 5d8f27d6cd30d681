"""Parameter groups: which parameters of a model are trained with which options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from app.config.schema import OptimizerOptions
from app.runtime.errors import UserError
from app.training.optim.parameter_selection import ParameterSelector, modules_around

DEFAULT = ""  # name of the group of all parameters that match no other
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
ParamGroup = dict[str, Any]  # one of `torch.optim.Optimizer.param_groups`


class _Part(NamedTuple):
    """What has the same options: a part of a group."""

    name: str
    layer: int | None
    decays: bool


def make_param_groups(
    key: str,
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    options: OptimizerOptions,
    arguments: Mapping[str, Mapping[str, Any]],
    lr_factor: float = 1.0,
) -> list[ParamGroup]:
    """Divide the parameters of an optimizer into groups, as torch's optimizers take them.

    The groups are in the order of `options`, after the default one. With a `layer_decay` each is
    divided by layer, the last layer first, and without decay of norms and biases also into what
    has weight decay and what has not. Besides `params` and its arguments, each dict has
    `param_names`, the `name` of the group, the `layer`, and `lr_scale`, by which
    `scale_learning_rates` multiplies the learning rate.

    Args:
        key: Key of the optimizer in the configuration, for errors.
        model: Its modules decide what a group contains.
        parameters: What the optimizer trains, by name.
        options: The groups, and what divides them further.
        arguments: Arguments of the optimizer that a group sets, by name of the group.
        lr_factor: Factor of all learning rates.

    Raises:
        UserError: A group contains no parameters.
    """
    groups = {name: group for name, group in options.groups.items() if group is not None}
    members = ParameterSelector(model, parameters).first_match(f"{key}.groups", groups)
    layers = layer_indices(model) if options.layer_decay is not None else {}
    last = max((layers[name] for name in parameters if name in layers), default=0)
    undecayed = set() if options.decay_norm_and_bias else norms_and_biases(model, parameters)
    parts: dict[_Part, list[str]] = {}
    for name in parameters:
        layer = layers.get(name, last) if layers else None
        parts.setdefault(
            _Part(members.get(name, DEFAULT), layer, name not in undecayed), []
        ).append(name)
    order = [DEFAULT, *groups]
    result = []
    for part in sorted(parts, key=lambda p: (order.index(p.name), -(p.layer or 0), not p.decays)):
        scale = groups[part.name].lr_scale if part.name in groups else 1.0
        if part.layer is not None and options.layer_decay is not None:
            scale *= options.layer_decay ** (last - part.layer)
        names = parts[part]
        result.append(
            {
                "params": [parameters[name] for name in names],
                "param_names": names,
                "name": part.name,
                "layer": part.layer,
                "lr_scale": scale * lr_factor,
                **arguments.get(part.name, {}),
                **({} if part.decays else {"weight_decay": 0.0}),
            }
        )
    return result


def norms_and_biases(model: nn.Module, parameters: Mapping[str, Tensor]) -> set[str]:
    """Return the names of the parameters that have no weight decay by convention.

    As in timm, these are all vectors and scalars, all biases, and what a method
    `no_weight_decay` of a module names, such as position embeddings.
    """
    listed = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if callable(method := getattr(module, "no_weight_decay", None))
        for name in method()
    }
    return {
        name
        for name, parameter in parameters.items()
        if parameter.ndim <= 1
        or name.endswith("bias")
        or name in listed
        or isinstance([*modules_around(model, name)][-1], NORMS)
    }


def layer_indices(model: nn.Module) -> dict[str, int]:
    """Return the layer of each parameter, counted from 0 at the input.

    A child of a `Sequential` or `ModuleList` is a layer, with all that is in it; if it is one of
    these itself, its children are. What is defined before, between or after them is one layer each.
    Norms belong to the layer before them in the same container, otherwise to the one after them.
    For a vision transformer these are the layers of BEiT (Bao et al. 2021): the embeddings are 0,
    the blocks 1 to N, and the norm and the head N + 1.
    """
    shapes = {name: parameter.ndim for name, parameter in model.named_parameters()}
    layers: list[list[str]] = []
    norms: list[str] = []  # that belong to the next layer
    for unit, members in groupby(shapes, lambda name: _unit(model, name)):
        names = list(members)
        if any(shapes[name] > 1 for name in names):
            layers.append([*norms, *names])
            norms = []
        elif unit and layers:
            layers[-1] += names
        else:
            norms += names
    layers[-1:] = [[*layers[-1], *norms]] if layers else [norms]
    return {name: index for index, names in enumerate(layers) for name in names}


def _unit(model: nn.Module, name: str) -> str:
    """Return the child of the outermost containers that a parameter is in; empty outside of one."""
    parts, in_container = name.split("."), False
    for depth, module in enumerate(modules_around(model, name)):
        is_container = isinstance(module, (nn.Sequential, nn.ModuleList))
        if in_container and not is_container:
            return ".".join(parts[:depth])
        in_container = is_container
    return ".".join(parts[:-1]) if in_container else ""


def batch_size_factor(options: OptimizerOptions, batch_size: int) -> float:
    """Return the factor of the learning rates for a number of samples per optimizer step.

    Proportional to it, as in Goyal et al. 2017, or to its square root, as is usual for Adam.
    """
    if options.lr_base_size is None:
        return 1.0
    ratio = batch_size / options.lr_base_size
    return float(ratio**0.5) if options.lr_base_scale == "sqrt" else ratio


def scale_learning_rates(param_groups: Iterable[ParamGroup], base_lr: float | None) -> None:
    """Multiply learning rates by their `lr_scale`, which becomes their ratio to `base_lr`.

    The result is also kept as `base_lr` of the group, which no schedule changes.

    Args:
        param_groups: Groups of an optimizer that was just built.
        base_lr: The `lr` in the configuration of the optimizer; None if it has none.
    """
    for group in param_groups:
        group["lr"] = group["base_lr"] = float(group["lr"]) * group["lr_scale"]
        if base_lr:
            group["lr_scale"] = group["lr"] / base_lr


def check_same_groups(saved: Sequence[ParamGroup], groups: Sequence[ParamGroup]) -> None:
    """Check that a saved optimizer has each parameter in the same group.

    Groups without names of parameters, which a program built itself, are not compared.

    Raises:
        UserError: A parameter is in another group; the message names the first one.
    """
    if not all("param_names" in group for group in (*saved, *groups)):
        return
    before, now = _places(saved), _places(groups)
    for name in [*now, *before]:
        if before.get(name) != now.get(name):
            raise UserError(
                f"optimizer: the parameter {name!r} was in {_describe_place(before.get(name))} and "
                f"is in {_describe_place(now.get(name))} now; a run resumes with its own groups"
            )


def _places(groups: Sequence[ParamGroup]) -> dict[str, tuple[int, str]]:
    """Return the number and the description of the group of each parameter."""
    return {
        name: (number, label(group))
        for number, group in enumerate(groups)
        for name in group["param_names"]
    }


def _describe_place(place: tuple[int, str] | None) -> str:
    return "no group" if place is None else f"group {place[0]} ({place[1]})"


def label(group: ParamGroup) -> str:
    """Return the name of a group for people, with its layer."""
    layer = group.get("layer")
    return (group.get("name") or "default") + ("" if layer is None else f", layer {layer}")
