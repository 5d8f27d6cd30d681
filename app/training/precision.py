"""Numeric precision: autocast, gradient scaling, memory format and determinism."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Precision:
    """In which type a forward pass computes; weights stay in float32.

    Attributes:
        name: `fp32`, `bf16` or `fp16`.
        device_type: As in `torch.device.type`.
    """

    name: str
    device_type: str

    @classmethod
    def choose(cls, name: str, device: torch.device) -> Precision:
        """`auto` is bf16 on a CUDA device with units for it, else fp32."""
        if name == "auto":
            fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
            name = "bf16" if fast else "fp32"
        return cls(name, device.type)

    def autocast(self) -> AbstractContextManager[object]:
        if self.name == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.name == "bf16" else torch.float16
        return torch.autocast(self.device_type, dtype)

    def disabled(self) -> AbstractContextManager[object]:
        """Full precision inside an autocast."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device_type, enabled=False)

    def widened(self, tensor: torch.Tensor) -> torch.Tensor:
        """In float32 what the forward pass gave in less, so that metrics are exact."""
        narrow = self.name != "fp32" and tensor.dtype in (torch.bfloat16, torch.float16)
        return tensor.float() if narrow else tensor

    def scaler(self) -> torch.amp.GradScaler:
        """Keeps small gradients of fp16 from vanishing; does nothing for the other types."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")


def memory_format(channels_last: bool | str, model: nn.Module) -> torch.memory_format:
    """`auto` is channels_last for models with 2-D convolutions, where it is faster."""
    if channels_last == "auto":
        channels_last = any(isinstance(module, nn.Conv2d) for module in model.modules())
    return torch.channels_last if channels_last else torch.contiguous_format


def make_deterministic(deterministic: bool) -> None:
    """Only deterministic algorithms from now on, or whichever are fastest."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
