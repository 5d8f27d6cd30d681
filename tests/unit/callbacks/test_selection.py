"""Selection of the outputs that callbacks use."""

from __future__ import annotations

from app.callbacks.selection import configured_logit_outputs


def test_class_outputs_are_those_of_classification_losses() -> None:
    terms = {
        "a": {"function": {"_target_": "torch.nn.CrossEntropyLoss"}, "output": "head"},
        "b": {"function": {"_target_": "app.losses.dice.DiceCrossEntropyLoss"}, "output": 1},
        "c": {"function": {"_target_": "torch.nn.MSELoss"}, "output": "image"},
        "d": None,
        "e": {"function": {"_target_": "app.losses.focal.FocalLoss"}},
    }
    assert configured_logit_outputs({"loss": terms}) == ["head", 1, None]
