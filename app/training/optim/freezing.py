"""Freezing of parameters for some or all epochs."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn

from app.config.schema import FreezeConfig
from app.runtime.errors import UserError, did_you_mean, join_choices


class FreezeSchedule:
    """Freezes and unfreezes parameters at the start of each epoch.

    Args:
        model: Model that owns the parameters.
        rules: Which parameters are frozen in which epochs; the names are used in error messages.

    Raises:
        UserError: If a pattern matches no parameter of the model.
    """

    def __init__(self, model: nn.Module, rules: Mapping[str, FreezeConfig]) -> None:
        self.model, self.rules = model, dict(rules)
        names = [name for name, _ in model.named_parameters()]
        for key, rule in rules.items():
            if not any(matches(name, rule.parameters) for name in names):
                parts = sorted({name.rpartition(".")[0] for name in names} - {""}) or names
                raise UserError(
                    f"freeze.{key}.parameters={rule.parameters!r} matches no parameter of the "
                    f"model; parts: {join_choices(parts)}{did_you_mean(rule.parameters, parts)}"
                )

    def apply(self, epoch: int) -> None:
        """Set `requires_grad` of all parameters for an epoch, counted from 1.

        Modules whose parameters are all frozen are put into evaluation mode, so that frozen
        batch normalization does not update its running statistics.
        """
        if not self.rules:
            return
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not self.is_frozen(name, epoch))
        for module in frozen_modules(self.model):
            module.eval()

    def is_frozen(self, name: str, epoch: int) -> bool:
        """Return whether the parameter of that name is frozen in an epoch, counted from 1."""
        return any(
            matches(name, rule.parameters) and rule.is_frozen_at(epoch)
            for rule in self.rules.values()
        )

    def is_always_frozen(self, name: str) -> bool:
        """Return whether the parameter of that name is frozen from the first epoch to the last."""
        return any(
            matches(name, rule.parameters) and rule.from_epoch == 1 and rule.until_epoch is None
            for rule in self.rules.values()
        )


def frozen_modules(model: nn.Module) -> set[nn.Module]:
    """Return modules of which, or of a module around which, no parameter is trained."""
    return {
        part
        for module in model.modules()
        if (own := list(module.parameters())) and not any(p.requires_grad for p in own)
        for part in module.modules()
    }


def matches(name: str, pattern: str) -> bool:
    """Return whether a parameter name matches a pattern.

    `layer1` matches everything inside that module; `*` and `[...]` are wildcards as in
    `layer[12].*.weight`.
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
