"""mode=export: the same outputs without this program."""

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


def model() -> nn.Module:
    torch.manual_seed(0)
    made = CNN(num_classes=3, in_channels=1, channels=[4, 8])
    return made.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload, no-any-return]


def outputs_of(path: Path, images: Tensor) -> Tensor:
    if path.suffix == ".pt2":
        loaded: Tensor = torch.export.load(path).module()(images)
        return loaded.detach()
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        (name,) = [one.name for one in session.get_inputs()]
        return torch.from_numpy(np.asarray(session.run(None, {name: images.numpy()})[0]))
    from safetensors.torch import load_file

    other = CNN(num_classes=3, in_channels=1, channels=[4, 8]).eval()
    other.load_state_dict(load_file(path))
    with torch.no_grad():
        found: Tensor = other(images)
    return found


@pytest.mark.parametrize("format", ["safetensors", "torch_export", "onnx"])
def test_an_exported_model_gives_the_same_for_any_number_of_samples(
    tmp_path: Path, format: Format
) -> None:
    path = export(model(), torch.rand(2, 1, 28, 28), format, tmp_path)
    images = torch.rand(5, 1, 28, 28)
    with torch.no_grad():
        expected = model()(images)
    torch.testing.assert_close(outputs_of(path, images), expected, atol=1e-5, rtol=1e-4)


class Undecided(nn.Linear):
    """Takes another way for other values, which no tracer can follow."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if input.sum().item() > 0 else input


@pytest.mark.parametrize("format", ["torch_export", "onnx"])
def test_a_model_that_cannot_be_traced_is_said_to_be_so(tmp_path: Path, format: Format) -> None:
    with pytest.raises(UserError, match=f"export.format='{format}': the model cannot be traced"):
        export(Undecided(3, 3).eval(), torch.rand(2, 3), format, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match=r'export needs safetensors.*pip install -e "\.\[export\]"'):
        export(model(), torch.rand(2, 1, 28, 28), "safetensors", tmp_path)
