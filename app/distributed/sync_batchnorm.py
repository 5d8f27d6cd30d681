"""Batch normalisation over the samples of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from app.distributed.collectives import AllReduceSum, is_distributed


class SyncBatchNorm(_BatchNorm):
    """What `torch.nn.SyncBatchNorm` does, wherever torch's own works on CUDA devices alone.

    Mean and variance are those of all samples of all ranks (Ioffe and Szegedy 2015, algorithm 1).

    Attributes:
        counts: Whether this rank's samples take part.
    """

    is_active = True

    def _check_input_dim(self, input: Tensor) -> None:
        """Of any number of dimensions."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # collectives inside a graph
    def forward(self, input: Tensor) -> Tensor:
        if not is_distributed() or not self.training:
            return super().forward(input)
        wide = input.float()
        mean, variance, count = self._moments(wide)
        if self.track_running_stats:
            self._follow(mean.detach(), variance.detach(), count)
        shape = (1, -1, *(1 for _ in wide.shape[2:]))
        normal = (wide - mean.view(shape)) * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(input.dtype)

    def _moments(self, wide: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance by channel, and of how many values; in two passes, which is exact."""
        others = [0, *range(2, wide.ndim)]
        own = float(self.is_active)
        values = wide.new_tensor([own * wide.numel() / wide.shape[1]])
        sums = _over_ranks(torch.cat([own * wide.sum(others), values]))
        mean, count = sums[:-1] / sums[-1], sums[-1].detach()
        shape = (1, -1, *(1 for _ in wide.shape[2:]))
        squares = own * (wide - mean.view(shape)).square().sum(others)
        return mean, _over_ranks(squares) / count, count

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        weight = (
            1 / self.num_batches_tracked.to(mean.dtype) if self.momentum is None else self.momentum
        )
        unbiased = variance * count / (count - 1)
        for running, now in ((self.running_mean, mean), (self.running_var, unbiased)):
            assert running is not None
            running += weight * (now - running)


def _over_ranks(tensor: Tensor) -> Tensor:
    found: Tensor = AllReduceSum.apply(tensor)
    return found


def convert_sync_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with batch normalisation over all ranks; names and weights stay."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-any-return]
    if isinstance(model, _BatchNorm):
        return _convert(model)
    for name, child in model.named_children():
        setattr(model, name, convert_sync_batchnorm(child, device))
    return model


def _convert(norm: _BatchNorm) -> SyncBatchNorm:
    found = SyncBatchNorm(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    )
    found.weight, found.bias = norm.weight, norm.bias
    for name, buffer in norm.named_buffers():
        found.register_buffer(name, buffer)
    found.train(norm.training)
    return found
