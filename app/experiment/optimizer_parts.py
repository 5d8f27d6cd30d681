"""Divide the parameters of a model among the optimizers of a configuration, and check both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from app.config.allowlist import TARGET
from app.config.instantiate import Instantiator
from app.config.optimizers import (
    group_arguments,
    optimizer_arguments,
    optimizer_nodes,
    optimizer_options,
)
from app.config.schema import Config, Node, ParameterGroup
from app.runtime.errors import UserError, did_you_mean, join_choices
from app.training.model_summary import IMPLEMENTATION_OPTIONS
from app.training.optim.freezing import FreezeSchedule
from app.training.optim.optim_wrapper import SINGLE
from app.training.optim.parameter_groups import ParamGroup, batch_size_factor, make_param_groups
from app.training.optim.parameter_selection import ParameterSelector
from app.training.task import Task

MUON = "torch.optim.Muon"
Parameters = Mapping[str, nn.Parameter]  # by name


class OptimizerPart(NamedTuple):
    """An optimizer that trains some of the groups at a key of the configuration."""

    key: str
    node: Node
    groups: list[ParamGroup]

    def groups_of(self, parameters: Parameters) -> list[ParamGroup]:
        """Return the groups with these parameters, which a strategy may have cut into shards."""
        return [
            {**group, "params": [parameters[name] for name in group["param_names"]]}
            for group in self.groups
        ]


def trained_parameters(task: Task, freezing: FreezeSchedule) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained in some epoch, by name."""
    return {
        name: parameter
        for name, parameter in task.parameters().items()
        if parameter.requires_grad and not freezing.is_always_frozen(name)
    }


def make_optimizer_parts(
    config: Config, instantiator: Instantiator, model: nn.Module, trained: Parameters
) -> dict[str, list[OptimizerPart]]:
    """Divide the trained parameters among the optimizers, by the key of their configuration.

    Raises:
        UserError: An optimizer or a group has no parameters, or some that it cannot train, or a
            parameter has no optimizer.
    """
    divided = {key: _parameters_of(key, trained) for key in optimizer_nodes(config.optimizer)}
    _check_divided(divided, trained)
    parts = {key: _parts_of(config, model, key, divided[key]) for key in divided}
    for part in (part for group in parts.values() for part in group):
        check_step(instantiator, part, model)
    return parts


def part_name(key: str) -> str:
    """Return the name of the part of the model that the optimizer at a key trains."""
    return key.partition(".")[2] or SINGLE


def _parameters_of(key: str, trained: Parameters) -> dict[str, nn.Parameter]:
    part = part_name(key)
    return {n: p for n, p in trained.items() if part == SINGLE or n.startswith(f"{part}.")}


def _check_divided(divided: Mapping[str, Parameters], trained: Parameters) -> None:
    """Check that every optimizer has parameters and every trained parameter an optimizer."""
    modules = sorted({name.partition(".")[0] for name in trained})
    for key, parameters in divided.items():
        if not parameters and not trained:
            raise UserError(f"{key}: nothing to train: all parameters are frozen")
        if not parameters:
            name = part_name(key)
            raise UserError(
                f"{key} has no parameters: {name!r} is not a trainable part of the model; "
                f"allowed: {join_choices(modules)}{did_you_mean(name, modules)}"
            )
    assigned = {name for parameters in divided.values() for name in parameters}
    unassigned = [name for name in trained if name not in assigned]
    if unassigned:
        raise UserError(
            f"optimizer: no optimizer for {unassigned[0]!r}; each of these parts of the model "
            f"needs an optimizer or has to be frozen: {join_choices(modules)}"
        )


def _parts_of(
    config: Config, model: nn.Module, key: str, parameters: Parameters
) -> list[OptimizerPart]:
    """Divide parameters into groups, and these by the optimizer that trains them."""
    node = optimizer_nodes(config.optimizer)[key]
    options, arguments = optimizer_options(node), group_arguments(node)
    own = {name: given for name, given in arguments.items() if TARGET in given}
    shared = {name: given for name, given in arguments.items() if name not in own}
    for name, given in own.items():
        if given[TARGET] == MUON:
            _check_has_matrices(f"{key}.groups.{name}", model, parameters, options.groups[name])
    batch_size = config.data.batch_size * config.trainer.accumulate_grad_batches
    factor = batch_size_factor(options, batch_size)
    groups = make_param_groups(key, model, parameters, options, shared, factor)
    nodes = {key: optimizer_arguments(node)} | {f"{key}.groups.{n}": own[n] for n in own}
    members: dict[str, list[ParamGroup]] = {place: [] for place in nodes}
    for group in groups:
        members[f"{key}.groups.{group['name']}" if group["name"] in own else key].append(group)
    return [OptimizerPart(place, nodes[place], members[place]) for place in nodes if members[place]]


def _check_has_matrices(
    key: str, model: nn.Module, parameters: Parameters, rule: ParameterGroup | None
) -> None:
    """Check that a model has what a group of Muon selects: weight matrices of hidden layers."""
    selector = ParameterSelector(model, parameters)
    if rule is None or not rule.hidden or selector.select(rule):
        return
    hidden = selector.select(ParameterGroup(hidden=True))
    ndims = join_choices(sorted({str(parameters[name].ndim) for name in hidden}))
    others = f"weights of {ndims} dimensions (convolutions)" if hidden else "no weights"
    raise UserError(
        f"{key}: Muon is for the weight matrices of hidden layers, and {type(model).__name__} has "
        f"none: its hidden layers that are trained have {others}; choose another optimizer, such "
        "as optimizer=adamw or optimizer=sgd"
    )


def check_step(instantiator: Instantiator, part: OptimizerPart, model: nn.Module) -> None:
    """Step with small parameters that stand for the real ones: as many dimensions, as sparse.

    Only optimizers of torch are tried; others may refuse parameters as small as these.

    Raises:
        UserError: The optimizer refuses dense or sparse gradients, or the number of dimensions.
    """
    if not part.node[TARGET].startswith("torch.optim."):
        return
    embeddings = (m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)))
    sparse = {id(embedding.weight) for embedding in embeddings if embedding.sparse}
    kinds: dict[tuple[int, bool], str] = {}
    for group in part.groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            kinds.setdefault((parameter.ndim, id(parameter) in sparse), name)
    for (ndim, is_sparse), name in kinds.items():
        stand_in = nn.Parameter(torch.zeros((1,) * ndim))
        stand_in.grad = stand_in.detach().to_sparse(1) if is_sparse else torch.zeros_like(stand_in)
        try:
            instantiator(part.key, without_implementation(part.node), [stand_in]).step()
        except (RuntimeError, UserError) as error:
            kind = "sparse" if is_sparse else "dense"
            rest = "; optimizer=muon trains all but matrices with AdamW"
            hint = rest if part.node[TARGET] == MUON else ""
            raise UserError(
                f"{part.key}: {part.node[TARGET]} cannot train {name!r} ({ndim} dimensions, {kind} "
                f"gradients): {error}{hint}"
            ) from error


def without_implementation(node: Node) -> Node:
    """Return the node of an optimizer without what depends on the device."""
    return {name: value for name, value in node.items() if name not in IMPLEMENTATION_OPTIONS}
