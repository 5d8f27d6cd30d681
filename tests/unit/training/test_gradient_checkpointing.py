"""Gradient checkpointing changes memory and time, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from app.models.cnn import CNN
from app.models.resnet import ResNet18
from app.models.unet import UNet
from app.runtime.errors import UserError
from app.training.gradient_checkpointing import checkpoint_blocks
from tests.support.fitting import fit

RUN = (
    *("data=shapes", "data.image_size=16", "data.batch_size=8", "model=unet", "model.width=4"),
    *("metric=segmentation", "goal.metric=dice", "loss=dice_ce", "average=ema"),
    *("trainer.limit_train_batches=3", "trainer.limit_valid_batches=1", "trainer.max_epochs=2"),
)


class Blocks(nn.Module):
    """Blocks with batch norm and dropout, one of them frozen, of inputs that are not used alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3))
            for _ in range(3)
        )
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        logits: Tensor = self.head(x)
        return logits


def train(model: nn.Module) -> dict[str, Tensor]:
    """Train for three steps, and return the weights and statistics."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters())
    model.train()
    model.blocks[1].eval()  # type: ignore[union-attr, operator]
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("blocks", [True, ["blocks.*"], ["blocks.0", "blocks.2.0"]])
def test_checkpoint_blocks_trains_the_same_weights_and_statistics(
    blocks: bool | Sequence[str],
) -> None:
    model = Blocks()
    names = checkpoint_blocks(checkpointed := copy.deepcopy(model), blocks)
    assert names
    before, after = train(model), train(copy.deepcopy(checkpointed))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert before["blocks.0.1.num_batches_tracked"] == 3


def test_fit_with_gradient_checkpointing_is_bitwise_equal(tmp_path: Path) -> None:
    def weights(name: str, *overrides: str) -> dict[str, Tensor]:
        trainer, _ = fit(tmp_path / name, *RUN, *overrides)
        return trainer.task.model.state_dict()

    plain = weights("plain")
    checkpointed = weights("checkpointed", "trainer.gradient_checkpointing=true")
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_checkpoint_blocks_computes_each_block_again_in_backward_only() -> None:
    model, calls = Blocks(), []
    for block in model.blocks:
        block[0].register_forward_hook(lambda *_: calls.append(1))  # type: ignore[index]
    checkpoint_blocks(model, True)
    with torch.no_grad():
        model(torch.randn(8, 6))
    assert len(calls) == 3
    outputs = model(torch.randn(8, 6))
    assert len(calls) == 6
    outputs.sum().backward()
    assert len(calls) == 9


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (CNN(2), ["features.0", "features.1", "features.2"]),
        (ResNet18(2, width=2), [f"levels.{level}" for level in range(4)]),
        (UNet(1, 2, 2, 2), ["down.0", "down.1", "merge.0", "merge.1"]),
    ],
)
def test_checkpoint_blocks_chooses_the_outermost_items(model: nn.Module, names: list[str]) -> None:
    assert checkpoint_blocks(model, True) == names
    assert checkpoint_blocks(model, False) == []


def test_checkpoint_blocks_without_blocks_names_the_modules() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(UserError, match=r"gradient_checkpointing=\[...\] of: 0, 1$"):
        checkpoint_blocks(model, True)
    with pytest.raises(UserError, match=r"='heat' matches no module .*; did you mean 'head'\?"):
        checkpoint_blocks(Blocks(), ["heat"])
