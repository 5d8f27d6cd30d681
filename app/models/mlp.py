"""A multi-layer perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU between them, for images or tables.

    Args:
        num_classes: Number of outputs; None (regression) gives one.
        input_shape: Shape of one sample; it is flattened.
        hidden: Number of units in each hidden layer.
        dropout: Dropout probability after each hidden layer.
    """

    def __init__(
        self,
        num_classes: int | None,
        input_shape: Sequence[int],
        hidden: Sequence[int] = (128,),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = [math.prod(input_shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for in_features, out_features in pairwise(sizes):
            layers += [nn.Linear(in_features, out_features), nn.ReLU(inplace=True)]
            layers += [nn.Dropout(dropout)] if dropout else []
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes or 1))

    def forward(self, samples: Tensor) -> Tensor:
        """Map samples of shape (N, *input_shape) to logits of shape (N, num_classes)."""
        logits: Tensor = self.layers(samples)
        return logits
