"""Pretrained models of torchvision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from app.models.pretrained import pretrained


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("resnet18", "fc"),
        ("alexnet", "classifier.6"),
        ("mobilenet_v3_small", "classifier.3"),
        ("densenet121", "classifier"),
        ("swin_t", "head"),
        ("vit_b_16", "heads.head"),
    ],
)
def test_pretrained_replaces_last_linear_layer(name: str, path: str) -> None:
    with torch.device("meta"):  # allocates no weights
        reference, model = torchvision.models.get_model(name), pretrained(name, 7, weights=None)
    head = model.get_submodule(path)
    assert isinstance(head, nn.Linear)
    assert head.out_features == 7
    assert list(model.state_dict()) == list(reference.state_dict())


def test_pretrained_gives_logits_and_all_parameters_get_gradients() -> None:
    model = pretrained("resnet18", 7, weights=None)
    outputs = model(torch.rand(2, 3, 32, 32))
    assert outputs.shape == (2, 7)
    outputs.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_pretrained_refuses_unknown_names_and_damaged_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="name='resnet' is not a classification model"):
        pretrained("resnet", 10)
    with pytest.raises(ValueError, match="allowed: IMAGENET1K_V1, DEFAULT, or null"):
        pretrained("resnet18", 10, weights="V3")
    with pytest.raises(ValueError, match=r"squeezenet1_0.* has no linear layer"):
        pretrained("squeezenet1_0", 10, weights=None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    file.parent.mkdir(parents=True)
    for content in (b"", b"text"):
        file.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"f37072fd\.pth is damaged or a different file: its SHA"
        ):
            pretrained("resnet18", 10)
    torch.save({"fc.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"f37072fd\.pth is damaged or a different file: its SHA"):
        pretrained("resnet18", 10)
