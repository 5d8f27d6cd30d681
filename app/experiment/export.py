"""A trained model for use without this program: safetensors, `torch.export`, ONNX."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from app.runtime.errors import UserError
from app.runtime.files import atomic_write
from app.runtime.nested import tensors

T = TypeVar("T")
Format = Literal["safetensors", "torch_export", "onnx"]
FILES = {"safetensors": "model.safetensors", "torch_export": "model.pt2", "onnx": "model.onnx"}


def export(model: nn.Module, sample: Tensor, format: Format, folder: Path) -> Path:
    """Writes a model, and sees that what was written gives the same outputs.

    Args:
        model: On the host, in evaluation mode.
        sample: Two samples as the model takes them; the number of samples stays free.
        format: `safetensors` (the weights alone), `torch_export` (loads with torch alone), `onnx`.
        folder: The file goes there.

    Returns:
        The file.

    Raises:
        UserError: A library is missing, or the model cannot be written so.
    """
    path = folder / FILES[format]
    content = {"safetensors": _safetensors, "torch_export": _program, "onnx": _onnx}[format](
        model, sample
    )
    atomic_write(path, lambda file: file.write(content))
    return path


def _safetensors(model: nn.Module, sample: Tensor) -> bytes:  # noqa: ARG001
    library = needed("safetensors.torch")
    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    content: bytes = library.save(state)
    found = library.load(content)
    _compare(all(torch.equal(found[name], tensor) for name, tensor in state.items()))
    return content


def _program(model: nn.Module, sample: Tensor) -> bytes:
    def traced() -> torch.export.ExportedProgram:
        shapes = ({0: torch.export.Dim("batch")},)
        return torch.export.export(model, (sample,), dynamic_shapes=shapes)

    content = io.BytesIO()
    torch.export.save(_tried("torch_export", traced), content)
    content.seek(0)
    loaded = torch.export.load(content).module()
    for inputs in (sample, sample[:1].repeat(3, *[1] * (sample.ndim - 1))):
        _compare(_alike(tensors(loaded(inputs)), tensors(model(inputs)), 1e-5))
    return content.getvalue()


def _onnx(model: nn.Module, sample: Tensor) -> bytes:
    for library in ("onnx", "onnxscript"):
        needed(library)
    runtime = needed("onnxruntime")
    for talkative in ("onnxscript", "onnx_ir", "torch.onnx"):
        logging.getLogger(talkative).setLevel(logging.WARNING)

    def traced() -> torch.onnx.ONNXProgram | None:
        shapes = ({0: torch.export.Dim("batch")},)
        return torch.onnx.export(
            model, (sample,), dynamo=True, dynamic_shapes=shapes, verbose=False
        )

    program = _tried("onnx", traced)
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (name,) = [one.name for one in session.get_inputs()]
    for inputs in (sample, sample[:1].repeat(3, *[1] * (sample.ndim - 1))):
        found = map(torch.from_numpy, session.run(None, {name: inputs.numpy()}))
        _compare(_alike(found, tensors(model(inputs)), 1e-4))
    return content


def _tried(format: str, trace: Callable[[], T]) -> T:
    try:
        return trace()
    except Exception as error:  # tracers raise whatever the model's code makes them raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"export.format={format!r}: the model cannot be traced: {reason}"
        ) from error


def _alike(found: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.allclose(a, b, atol=tolerance) for a, b in pairs)


def _compare(same: bool) -> None:
    if not same:
        raise UserError("export: what was written gives other outputs than the model")


def needed(library: str) -> ModuleType:
    """The library.

    Raises:
        UserError: It is not installed.
    """
    try:
        return import_module(library)
    except ImportError as error:
        raise UserError(f'export needs {library}: pip install -e ".[export]"') from error
