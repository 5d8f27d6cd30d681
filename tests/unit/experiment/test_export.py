"""`app.experiment.export`: exported models give the same outputs without this program."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from app.experiment.export import Format, export
from app.models.cnn import CNN
from app.runtime.errors import UserError


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = CNN(num_classes=3, in_channels=1, channels=[4, 8])
    return model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload, no-any-return]


def run_exported(path: Path, images: Tensor) -> Tensor:
    if path.suffix == ".pt2":
        loaded: Tensor = torch.export.load(path).module()(images)
        return loaded.detach()
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        (name,) = [node.name for node in session.get_inputs()]
        return torch.from_numpy(np.asarray(session.run(None, {name: images.numpy()})[0]))
    from safetensors.torch import load_file

    model = CNN(num_classes=3, in_channels=1, channels=[4, 8]).eval()
    model.load_state_dict(load_file(path))
    with torch.no_grad():
        outputs: Tensor = model(images)
    return outputs


def read_class_names(path: Path) -> str | None:
    """Return the names that a file contains, as JSON."""
    if path.suffix == ".pt2":
        extra = {"class_names": ""}
        torch.export.load(path, extra_files=extra)
        return extra["class_names"]
    if path.suffix == ".onnx":
        import onnxruntime

        metadata = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
        return str(metadata["class_names"])
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return str(file.metadata()["class_names"])


@pytest.mark.parametrize("format", ["safetensors", "torch_export", "onnx"])
def test_exported_model_gives_same_outputs_for_any_batch_size(
    tmp_path: Path, format: Format
) -> None:
    path = export(make_model(), torch.rand(2, 1, 28, 28), format, tmp_path, ["cat", "é", "o"])
    assert read_class_names(path) == '["cat", "\\u00e9", "o"]'
    images = torch.rand(5, 1, 28, 28)
    with torch.no_grad():
        expected = make_model()(images)
    torch.testing.assert_close(run_exported(path, images), expected, atol=1e-5, rtol=1e-4)


class DataDependentModel(nn.Linear):
    """Branches on the values of its input, which tracing does not support."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if input.sum().item() > 0 else input


@pytest.mark.parametrize("format", ["torch_export", "onnx"])
def test_export_of_untraceable_model_is_rejected(tmp_path: Path, format: Format) -> None:
    with pytest.raises(UserError, match=f"export.format='{format}': the model cannot be traced"):
        export(DataDependentModel(3, 3).eval(), torch.rand(2, 3), format, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_export_without_library_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match=r"safetensors is not installed.*pip install .*\[export\]"):
        export(make_model(), torch.rand(2, 1, 28, 28), "safetensors", tmp_path)
