"""Numeric precision: autocast, gradient scaling, memory format and determinism."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from app.config.schema import PRECISION_ALIASES
from app.runtime.nested import Nested, map_tensors

BF16_TRUE = "bf16-true"


@dataclass(frozen=True)
class Precision:
    """Data type of the forward pass, and with `bf16-true` of weights and optimizer states.

    Attributes:
        name: `fp32`, `bf16`, `fp16` or `bf16-true`.
        device_type: Type of the device, as in `torch.device.type`.
    """

    name: str
    device_type: str

    @classmethod
    def choose(cls, name: str | int, device: torch.device) -> Precision:
        """Return the precision of that name; `auto` is bf16 on CUDA devices with hardware for it.

        These are devices of compute capability 8.0 or higher; on all others `auto` is fp32.
        """
        name = PRECISION_ALIASES.get(str(name), str(name))
        if name == "auto":
            fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
            name = "bf16" if fast else "fp32"
        return cls(name, device.type)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the autocast context of a forward pass; it does nothing without autocast."""
        if not self.has_autocast:
            return nullcontext()
        dtype = torch.bfloat16 if self.name == "bf16" else torch.float16
        return torch.autocast(self.device_type, dtype)

    def disabled(self) -> AbstractContextManager[object]:
        """Return a context that disables autocast, for code that needs float32."""
        if not self.has_autocast:
            return nullcontext()
        return torch.autocast(self.device_type, enabled=False)

    @property
    def has_autocast(self) -> bool:
        """Whether the forward pass chooses the data type of each operation."""
        return self.name in ("bf16", "fp16")

    def convert(self, model: nn.Module) -> None:
        """Convert a model to the data type of its weights, if that is not float32.

        It still takes float32 inputs, and returns float32 outputs for losses and metrics.
        """
        if self.name == BF16_TRUE:
            model.to(torch.bfloat16)
            model.register_forward_pre_hook(_narrow_inputs, with_kwargs=True)
            model.register_forward_hook(_widen_outputs)

    def upcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Convert a bf16 or fp16 output to float32, so that metrics are exact."""
        is_reduced = self.name != "fp32" and tensor.dtype in (torch.bfloat16, torch.float16)
        return tensor.float() if is_reduced else tensor

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Return a gradient scaler; it is disabled unless the precision is fp16."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")


def _narrow_inputs(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    def narrow(tensor: Tensor) -> Tensor:
        return tensor.bfloat16() if tensor.is_floating_point() else tensor

    return map_tensors(narrow, args), map_tensors(narrow, kwargs)


def _widen_outputs(_module: nn.Module, _args: Any, outputs: Nested) -> Nested:
    def widen(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype == torch.bfloat16 else tensor

    return map_tensors(widen, outputs)


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


def set_matmul_precision(precision: str) -> None:
    """Set how exact products of float32 matrices are: `highest`, `high` or `medium`."""
    torch.set_float32_matmul_precision(precision)


def make_deterministic(deterministic: bool) -> None:
    """Use deterministic algorithms only, or let cuDNN choose the fastest ones."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
