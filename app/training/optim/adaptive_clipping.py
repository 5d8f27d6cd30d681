"""Adaptive gradient clipping."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

MIN_NORM = 1e-3  # of the weights of a unit, so that those which start at zero can be trained


@torch.no_grad()
def clip_gradients_adaptively(parameters: Iterable[Tensor], factor: float) -> None:
    """Limit the norm of the gradient of each unit to a share of the norm of its weights.

    Brock et al. 2021, "High-performance large-scale image recognition without normalization",
    equation 3. A unit is a row of a matrix, an output channel of a convolution, or a whole vector.

    Args:
        parameters: Those without a gradient, or with a sparse one, are left out. The paper also
            leaves out the output layer.
        factor: Largest ratio of both norms.
    """
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None or gradient.is_sparse:
            continue
        limit = _unit_norms(parameter).clamp(min=MIN_NORM) * factor
        norms = _unit_norms(gradient)
        gradient.mul_(torch.where(norms > limit, limit / norms.clamp(min=1e-6), 1.0))


def _unit_norms(tensor: Tensor) -> Tensor:
    """Return the norm of each unit, in a shape that can be multiplied with the tensor."""
    dims = tuple(range(1, tensor.ndim)) or None
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=dims, keepdim=True)
    return norms
