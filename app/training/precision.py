"""Numeric precision: autocast, gradient scaling, memory format and determinism."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Precision:
    """Data type of the forward pass; weights and optimizer states are always float32.

    Attributes:
        name: `fp32`, `bf16` or `fp16`.
        device_type: Type of the device, as in `torch.device.type`.
    """

    name: str
    device_type: str

    @classmethod
    def choose(cls, name: str, device: torch.device) -> Precision:
        """Return the precision of that name; `auto` is bf16 on CUDA devices with hardware for it.

        These are devices of compute capability 8.0 or higher; on all others `auto` is fp32.
        """
        if name == "auto":
            fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
            name = "bf16" if fast else "fp32"
        return cls(name, device.type)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the autocast context of a forward pass; it does nothing for fp32."""
        if self.name == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.name == "bf16" else torch.float16
        return torch.autocast(self.device_type, dtype)

    def disabled(self) -> AbstractContextManager[object]:
        """Return a context that disables autocast, for code that needs float32."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device_type, enabled=False)

    def upcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Convert a bf16 or fp16 output to float32, so that metrics are exact."""
        is_reduced = self.name != "fp32" and tensor.dtype in (torch.bfloat16, torch.float16)
        return tensor.float() if is_reduced else tensor

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Return a gradient scaler; it is disabled unless the precision is fp16."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")


def memory_format(channels_last: bool | str, model: nn.Module) -> torch.memory_format:
    """Return the memory format of a model.

    Args:
        channels_last: True, False, or `auto` for channels_last if the model has 2-D convolutions,
            which are faster that way.
        model: Model to choose the format for.
    """
    if channels_last == "auto":
        channels_last = any(isinstance(module, nn.Conv2d) for module in model.modules())
    return torch.channels_last if channels_last else torch.contiguous_format


def make_deterministic(deterministic: bool) -> None:
    """Use deterministic algorithms only, or let cuDNN choose the fastest ones."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
