"""Copies of tensors on their way to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor on the host, which begins now and blocks nothing on a CUDA device.

    On other devices the tensor is copied when the copy is asked for.

    Args:
        tensor: Tensor on the device.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.copied = tensor, None
        if tensor.is_cuda:
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self.tensor = host.copy_(tensor, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    @property
    def is_ready(self) -> bool:
        """Whether the copy can be had without waiting for a CUDA device."""
        return self.copied is None or self.copied.query()

    def get(self) -> Tensor:
        """Return the copy, after waiting for it if necessary."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.tensor.cpu()
