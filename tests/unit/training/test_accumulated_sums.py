"""Losses that are functions of sums over all accumulated batches of an optimizer step."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from app.losses.dice import DiceCrossEntropyLoss, DiceLoss
from app.losses.weighted_sum import Term, WeightedSum
from app.losses.weights import UncertaintyWeight
from app.training.supervised import SupervisedTask
from tests.support.points import fit, make_optimizers

IMAGES = torch.randn(10, 2, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 3, (10, 4, 4), generator=torch.Generator().manual_seed(1))
LABELS[4:8] = 0  # where 0 is ignored, the second batch of four counts for nothing
WEIGHTED = Term(nn.CrossEntropyLoss(torch.tensor([0.1, 1.0, 5.0])), 0.5)
IGNORING = Term(nn.CrossEntropyLoss(ignore_index=0))
LOSSES = {
    "two divisors": {"weighted": WEIGHTED, "ignoring": IGNORING},
    "dice of the batch": {"dice": Term(DiceLoss(per_sample=False))},
    "both parts of one loss": {"main": Term(DiceCrossEntropyLoss(ignore_index=0))},
    "all": {
        "weighted": WEIGHTED,
        "dice": Term(DiceLoss(per_sample=False, ignore_index=0), UncertaintyWeight()),
        "per sample": Term(DiceLoss()),
    },
}


def train(folder: Path, model: nn.Module, loss: WeightedSum, size: int, accumulate: int) -> None:
    task = SupervisedTask(model, loss)
    task.prepare_training(make_optimizers(model, batch_size=size, accumulate=accumulate))
    fit(task, folder, TensorDataset(IMAGES, LABELS), batch_size=size)


@pytest.mark.parametrize("name", LOSSES)
def test_accumulated_batches_of_unequal_size_train_as_one(tmp_path: Path, name: str) -> None:
    weights = []
    for size, accumulate in ((10, 1), (4, 3)):
        torch.manual_seed(0)
        model, loss = nn.Conv2d(2, 3, 3, padding=1), WeightedSum(copy.deepcopy(LOSSES[name]))
        train(tmp_path / str(size), model, loss, size, accumulate)
        weights.append(model.weight)
    torch.testing.assert_close(weights[1], weights[0])


class Recorder(nn.Sequential):
    """Records its outputs in training mode."""

    outputs: list[Tensor]

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = super().forward(input)
        if self.training:
            self.outputs.append(output)
        return output


def test_loss_that_is_a_mean_over_samples_is_computed_once(tmp_path: Path) -> None:
    model = Recorder(nn.Conv2d(2, 3, 1))
    model.outputs = []
    train(tmp_path, model, WeightedSum({"main": Term(DiceLoss())}), 4, 2)
    measured = [output for output in model.outputs if not output.requires_grad]
    assert [len(output) for output in measured] == [2]  # to find out


@pytest.mark.parametrize("name", ["dice of the batch", "loss of torch"])
def test_first_forward_pass_gives_the_outputs_of_the_second_and_leaves_no_traces(
    tmp_path: Path, name: str
) -> None:
    loss = WeightedSum(LOSSES.get(name, {"main": Term(nn.CrossEntropyLoss())}))
    model = Recorder(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5))
    model.outputs = []
    train(tmp_path, model, loss, 4, 2)
    measured = [output for output in model.outputs if not output.requires_grad]
    trained = [output for output in model.outputs if output.requires_grad]
    assert [len(output) for output in trained] == [4, 4, 2]
    if name == "loss of torch":
        assert not measured
    else:
        assert len(measured.pop(0)) == 2  # before the first epoch, to find out whether it sums
        torch.testing.assert_close(measured, [output.detach() for output in trained])
    assert model[1].num_batches_tracked == 3
