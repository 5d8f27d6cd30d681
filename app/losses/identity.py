"""The loss of models that compute it themselves."""

from __future__ import annotations

from torch import Tensor, nn


class Identity(nn.Module):
    """The mean of the output; the target is not looked at."""

    def forward(self, output: Tensor, target: object) -> Tensor:  # noqa: ARG002 - losses take two
        """Losses of any shape to their mean."""
        return output.mean()
