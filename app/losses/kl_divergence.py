"""KL divergence from target distributions, for example those of a teacher model."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Targets = Literal["logits", "probabilities", "log_probabilities"]


class KLDivLoss(nn.Module):
    """`KL(target || softmax(output / T)) * T^2`, summed over classes, averaged over the rest.

    The factor T^2 keeps the scale of the gradients independent of T: Hinton et al., "Distilling the
    Knowledge in a Neural Network", 2015 (https://arxiv.org/abs/1503.02531).

    Args:
        temperature: Temperature T, above 0; a higher one gives more weight to unlikely classes.
        targets: Form of the target. Logits are divided by T, too; probabilities are used as given.
    """

    def __init__(self, temperature: float = 1.0, targets: Targets = "probabilities") -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature} must be above 0 and finite")
        if targets not in get_args(Targets):
            raise ValueError(f"targets={targets!r} must be one of: {', '.join(get_args(Targets))}")
        self.temperature, self.targets = temperature, targets

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the loss, computed in float32 or wider.

        Args:
            output: Logits of shape (N, C, ...).
            target: Floating-point values of the same shape; classes of probability 0 add 0.

        Raises:
            ValueError: The shapes differ.
        """
        if output.shape != target.shape:
            raise ValueError(
                f"target has shape {list(target.shape)}, output {list(output.shape)}; "
                "they must be the same"
            )
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        log_q = (output / self.temperature).log_softmax(dim=1)
        losses = F.kl_div(log_q, self._probabilities(target.to(output.dtype)), reduction="none")
        return losses.sum(dim=1).mean() * self.temperature**2

    def _probabilities(self, target: Tensor) -> Tensor:
        if self.targets == "logits":
            return (target / self.temperature).softmax(dim=1)
        return target if self.targets == "probabilities" else target.exp()
