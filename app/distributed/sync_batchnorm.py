"""Batch normalization over the samples of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from app.distributed.collectives import is_distributed
from app.runtime.rank_sums import AllReduceSum


def convert_sync_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Replace batch normalization by a synchronized one; names and weights stay the same."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-any-return]
    if isinstance(model, _BatchNorm):
        return _convert(model)
    for name, child in model.named_children():
        setattr(model, name, convert_sync_batchnorm(child, device))
    return model


def _convert(norm: _BatchNorm) -> SyncBatchNorm:
    converted = SyncBatchNorm(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    )
    converted.weight, converted.bias = norm.weight, norm.bias
    for name, buffer in norm.named_buffers():
        converted.register_buffer(name, buffer)
    converted.train(norm.training)
    return converted


class SyncBatchNorm(_BatchNorm):
    """Counterpart of `torch.nn.SyncBatchNorm` that also works on the CPU.

    Mean and variance are taken over all samples of all ranks (Ioffe and Szegedy 2015, algorithm 1).

    Attributes:
        is_active: Whether this rank's samples count; False for a padding batch.
    """

    is_active = True

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any number of dimensions."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # collectives inside a graph
    def forward(self, input: Tensor) -> Tensor:
        if not is_distributed() or not self.training:
            return super().forward(input)
        inputs = input.float()
        mean, variance, count = self._moments(inputs)
        if self.track_running_stats:
            self._update_running_stats(mean.detach(), variance.detach(), count)
        shape = (1, -1, *(1 for _ in inputs.shape[2:]))
        outputs = (inputs - mean.view(shape)) * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            outputs = outputs * self.weight.view(shape) + self.bias.view(shape)
        return outputs.to(input.dtype)

    def _moments(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean and variance per channel and the number of values per channel.

        Two passes are more accurate than the difference of the mean square and the squared mean.
        """
        reduced_dims = [0, *range(2, inputs.ndim)]
        weight = float(self.is_active)
        local_count = inputs.new_tensor([weight * inputs.numel() / inputs.shape[1]])
        sums = _all_reduce_sum(torch.cat([weight * inputs.sum(reduced_dims), local_count]))
        mean, count = sums[:-1] / sums[-1], sums[-1].detach()
        shape = (1, -1, *(1 for _ in inputs.shape[2:]))
        squares = weight * (inputs - mean.view(shape)).square().sum(reduced_dims)
        return mean, _all_reduce_sum(squares) / count, count

    @torch.no_grad()
    def _update_running_stats(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = (
            1 / self.num_batches_tracked.to(mean.dtype) if self.momentum is None else self.momentum
        )
        unbiased = variance * count / (count - 1)
        for running, current in ((self.running_mean, mean), (self.running_var, unbiased)):
            assert running is not None
            running += momentum * (current - running)


def _all_reduce_sum(tensor: Tensor) -> Tensor:
    total: Tensor = AllReduceSum.apply(tensor)
    return total
