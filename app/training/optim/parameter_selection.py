"""Selection of parameters by name, number of dimensions and the modules around them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from app.config.schema import ParameterGroup
from app.runtime.errors import UserError, did_you_mean, join_choices
from app.training.optim.freezing import matches

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


class ParameterSelector:
    """Finds the parameters that the rule of a group selects.

    Args:
        model: Model with the modules around the parameters.
        parameters: Parameters to select from, by name; some may belong to no module.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        self.parameters, self.output_layer = parameters, output_layer(model, parameters)
        self.modules = {name: list(modules_around(model, name)) for name in parameters}

    def first_match(self, key: str, groups: Mapping[str, ParameterGroup]) -> dict[str, str]:
        """Return the first group that selects each parameter; those that none selects are left out.

        Args:
            key: Key of the groups in the configuration, for errors.
            groups: Groups by name, in their order.

        Raises:
            UserError: A group is not the first of any parameter.
        """
        members: dict[str, str] = {}
        for group, rule in groups.items():
            selected = self.select(rule)
            free = [name for name in selected if name not in members]
            if not selected:
                raise UserError(f"{key}.{group}{self.explain_no_match(rule)}")
            if not free:
                earlier = ", ".join(dict.fromkeys(members[name] for name in selected))
                raise UserError(
                    f"{key}.{group} has no parameters: all that it selects are in groups before "
                    f"it: {earlier}"
                )
            members |= dict.fromkeys(free, group)
        return members

    def select(self, rule: ParameterGroup) -> list[str]:
        """Return the names of the parameters that match everything in a rule."""
        patterns, types = _as_list(rule.parameters), _as_list(rule.module_type)
        ndims = _as_list(rule.ndim)
        return [
            name
            for name, parameter in self.parameters.items()
            if (not patterns or any(matches(name, pattern) for pattern in patterns))
            and (not types or not self._types(name).isdisjoint(types))
            and (not ndims or parameter.ndim in ndims)
            and (not rule.hidden or self._is_hidden(name))
        ]

    def _types(self, name: str) -> set[str]:
        """Return the class names of the modules around a parameter, with their base classes."""
        return {cls.__name__ for module in self.modules[name] for cls in type(module).__mro__}

    def _is_hidden(self, name: str) -> bool:
        """Return whether a parameter is a weight, and not of an embedding or the output layer."""
        owner = self.modules[name][-1]
        is_weight = self.parameters[name].ndim >= 2
        return is_weight and not isinstance(owner, EMBEDDINGS) and owner is not self.output_layer

    def explain_no_match(self, rule: ParameterGroup) -> str:
        """Return which part of a rule selects nothing, and what there is, for an error."""
        names = list(self.parameters)
        parts = [name.rpartition(".")[0] for name in names]
        tops = [name.partition(".")[0] for name in parts]
        types = {type(module).__name__ for modules in self.modules.values() for module in modules}
        known = {
            "parameters": [part for part in dict.fromkeys([*tops, *parts]) if part] or names,
            "module_type": sorted(types),
            "ndim": sorted({str(parameter.ndim) for parameter in self.parameters.values()}),
        }
        for selector, choices in known.items():
            for value in _as_list(getattr(rule, selector)):
                if not self.select(ParameterGroup(**{selector: value})):
                    close = did_you_mean(str(value), [*choices, *names])
                    return (
                        f".{selector}={value!r} matches no trained parameter; the model has: "
                        f"{join_choices(choices)}{close}"
                    )
        if rule.hidden and not self.select(ParameterGroup(hidden=True)):
            return ".hidden=True: the model has no weights but those of its output layer"
        return " matches no trained parameter, although each of its selectors does"


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def modules_around(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """Yield the modules that contain a parameter, from the model to the parameter's owner."""
    yield model
    module: Any = model
    for part in name.split(".")[:-1]:
        module = getattr(module, part, None)
        if not isinstance(module, nn.Module):  # a parameter of the loss
            return
        yield module


def output_layer(model: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module | None:
    """Return the last module, in the order of definition, that owns a weight among parameters."""
    weights = [name for name, parameter in parameters.items() if parameter.ndim >= 2]
    return list(modules_around(model, weights[-1]))[-1] if weights else None
