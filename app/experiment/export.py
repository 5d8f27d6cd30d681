"""Export a trained model for use without this program: safetensors, `torch.export`, ONNX."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from app.config.instantiate import check_part_names
from app.runtime.errors import UserError
from app.runtime.extras import import_extra
from app.runtime.files import atomic_write
from app.runtime.nested import iter_tensors

T = TypeVar("T")
Metadata = dict[str, str]
NAMES_KEY = "class_names"
Format = Literal["safetensors", "torch_export", "onnx"]
FILES = {"safetensors": "model.safetensors", "torch_export": "model.pt2", "onnx": "model.onnx"}


def export(
    model: nn.Module,
    sample: Tensor,
    format: Format,
    folder: Path,
    class_names: Sequence[str] | None = None,
) -> Path:
    """Write a model to a file, and check that the exported model gives the same outputs.

    Args:
        model: On the CPU, in evaluation mode.
        sample: Inputs of shape (2, ...); the batch size of the exported model is dynamic.
        format: `safetensors` (weights only), `torch_export` (loads with torch alone) or `onnx`.
        folder: Where to write the file.
        class_names: Names of the classes, stored in the file as JSON under the key `class_names`
            of its metadata (of `extra_files` with `torch_export`); None if there are none.

    Returns:
        The path of the file.

    Raises:
        UserError: A library is missing, or the model cannot be exported to this format.
    """
    path = folder / FILES[format]
    exporters = {"safetensors": _to_safetensors, "torch_export": _to_torch_export, "onnx": _to_onnx}
    metadata = {} if class_names is None else {NAMES_KEY: json.dumps([*class_names])}
    content = exporters[format](model, sample, metadata)
    atomic_write(path, lambda file: file.write(content))
    return path


def _to_safetensors(model: nn.Module, sample: Tensor, metadata: Metadata) -> bytes:  # noqa: ARG001
    library = import_extra("safetensors.torch", "export")
    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    content: bytes = library.save(state, metadata)
    loaded = library.load(content)
    _check_same(all(torch.equal(loaded[name], tensor) for name, tensor in state.items()))
    return content


def _to_torch_export(model: nn.Module, sample: Tensor, metadata: Metadata) -> bytes:
    def trace() -> torch.export.ExportedProgram:
        shapes = ({0: torch.export.Dim("batch")},)
        return torch.export.export(model, (sample,), dynamic_shapes=shapes)

    content = io.BytesIO()
    torch.export.save(_traced("torch_export", model, trace), content, extra_files=metadata)
    content.seek(0)
    loaded = torch.export.load(content).module()
    _check_outputs(lambda inputs: iter_tensors(loaded(inputs)), model, sample, 1e-5)
    return content.getvalue()


def _to_onnx(model: nn.Module, sample: Tensor, metadata: Metadata) -> bytes:
    for library in ("onnx", "onnxscript"):
        import_extra(library, "export")
    runtime = import_extra("onnxruntime", "export")
    for verbose_library in ("onnxscript", "onnx_ir", "torch.onnx"):
        logging.getLogger(verbose_library).setLevel(logging.WARNING)

    def trace() -> torch.onnx.ONNXProgram | None:
        shapes = ({0: torch.export.Dim("batch")},)
        return torch.onnx.export(
            model, (sample,), dynamo=True, dynamic_shapes=shapes, verbose=False
        )

    program = _traced("onnx", model, trace)
    assert program is not None
    proto = program.model_proto
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    content: bytes = proto.SerializeToString()
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (name,) = [node.name for node in session.get_inputs()]

    def run(inputs: Tensor) -> Iterable[Tensor]:
        return map(torch.from_numpy, session.run(None, {name: inputs.numpy()}))

    _check_outputs(run, model, sample, 1e-4)
    return content


def _traced(format: str, model: nn.Module, trace: Callable[[], T]) -> T:
    check_part_names(f"export.format={format!r}", model)
    try:
        return trace()
    except Exception as error:  # tracers raise whatever the model's code makes them raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"export.format={format!r}: the model cannot be traced: {reason}"
        ) from error


def _check_outputs(
    run: Callable[[Tensor], Iterable[Tensor]], model: nn.Module, sample: Tensor, tolerance: float
) -> None:
    for inputs in (sample, torch.cat([sample, sample[:1]])):  # two batch sizes
        pairs = zip(run(inputs), iter_tensors(model(inputs)), strict=True)
        _check_same(all(torch.allclose(a, b, atol=tolerance) for a, b in pairs))


def _check_same(same: bool) -> None:
    if not same:
        raise UserError("export: the exported model does not give the same outputs as the model")
