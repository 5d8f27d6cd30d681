"""The model with two heads."""

from __future__ import annotations

import torch

from app.models.two_heads import TwoHeads


def test_two_heads_share_trunk() -> None:
    model = TwoHeads(1, width=8)
    outputs = model(torch.rand(4, 1, 28, 28))
    assert {name: tensor.shape for name, tensor in outputs.items()} == {
        "digit": (4, 10),
        "parity": (4, 2),
    }
    outputs["parity"].sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, _ in model.named_parameters() if not n.startswith("digit")}
