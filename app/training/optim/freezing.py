"""Which weights stay as they are, and for how long."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn

from app.config.schema import FreezeConfig
from app.runtime.errors import UserError, nearest, one_of


class FreezeSchedule:
    """Freezes and unfreezes parameters by epoch.

    Args:
        model: Whose parameters.
        frozen: By name, for errors.

    Raises:
        UserError: A pattern that no parameter has.
    """

    def __init__(self, model: nn.Module, frozen: Mapping[str, FreezeConfig]) -> None:
        self.model, self.frozen = model, dict(frozen)
        names = [name for name, _ in model.named_parameters()]
        for key, freeze in frozen.items():
            if not any(matches(name, freeze.parameters) for name in names):
                parts = sorted({name.rpartition(".")[0] for name in names} - {""}) or names
                raise UserError(
                    f"freeze.{key}.parameters={freeze.parameters!r} fits no parameter of the "
                    f"model; parts: {one_of(parts)}{nearest(freeze.parameters, parts)}"
                )

    def apply(self, epoch: int) -> None:
        """Freezes what is frozen in that epoch, counted from 1; its modules measure no batches."""
        if not self.frozen:
            return
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not self.holds(name, epoch))
        for module in self.model.modules():
            own = list(module.parameters())
            if own and not any(parameter.requires_grad for parameter in own):
                module.eval()

    def holds(self, name: str, epoch: int) -> bool:
        """Whether a parameter of that name is frozen in that epoch."""
        return any(
            matches(name, freeze.parameters) and freeze.holds(epoch)
            for freeze in self.frozen.values()
        )

    def forever(self, name: str) -> bool:
        """Whether a parameter of that name never learns."""
        return any(
            matches(name, freeze.parameters)
            and freeze.from_epoch == 1
            and freeze.until_epoch is None
            for freeze in self.frozen.values()
        )


def matches(name: str, pattern: str) -> bool:
    """`layer1` fits all that lies in it; `*` stands for anything, as in `layer[12].*.weight`."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
