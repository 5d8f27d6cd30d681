"""What several losses have in common: ignored labels, precision, argument and target checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.testing import assert_close

from app.config.instantiate import Instantiator
from app.losses.dice import DiceCrossEntropyLoss, DiceLoss
from app.losses.focal import BinaryFocalLoss, FocalLoss
from app.losses.kl_divergence import KLDivLoss
from app.losses.weighted_sum import Term
from tests.support.losses import (
    IGNORE_INDEX,
    Loss,
    assert_matches,
    loss_and_gradient,
    make_labels,
    make_labels_for,
    make_logits,
)

LOSSES_WITH_IGNORE_INDEX: list[tuple[Loss, int]] = [  # with the number of output channels
    (DiceLoss(ignore_index=IGNORE_INDEX), 3),
    (DiceLoss(ignore_index=IGNORE_INDEX), 1),
    (DiceLoss(ignore_index=IGNORE_INDEX, per_sample=False), 3),
    (DiceCrossEntropyLoss(ignore_index=IGNORE_INDEX), 3),
    (DiceCrossEntropyLoss(ignore_index=IGNORE_INDEX), 1),
    (FocalLoss(alpha=[1.0, 2.0, 4.0], ignore_index=IGNORE_INDEX), 3),
]


@pytest.mark.parametrize(("loss", "classes"), LOSSES_WITH_IGNORE_INDEX)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_outputs_at_ignored_positions_do_not_affect_loss(
    loss: Loss, classes: int, dtype: torch.dtype
) -> None:
    output = make_logits(2, classes, 5, 4)
    target = make_labels_for(output)
    ignored = make_labels(2, 5, 4, classes=2).flip(-1) == 1
    target = target.masked_fill(ignored, IGNORE_INDEX).to(dtype)
    value, gradient = loss_and_gradient(loss, output, target)
    changed = torch.where(ignored.unsqueeze(1), 3 - 2 * output, output)
    assert loss(changed, target) == value
    ignored_outputs = ignored.unsqueeze(1).expand_as(gradient)
    assert (gradient[ignored_outputs] == 0).all()
    assert (gradient[~ignored_outputs] != 0).all()


@pytest.mark.parametrize(("loss", "classes"), LOSSES_WITH_IGNORE_INDEX)
def test_loss_with_ignored_positions_equals_loss_without_them(loss: Loss, classes: int) -> None:
    output = make_logits(2, classes, 5, 4)
    target = make_labels_for(output)
    cut = loss_and_gradient(loss, output[..., :3], target[..., :3])
    target[..., 3] = IGNORE_INDEX
    value, gradient = loss_and_gradient(loss, output, target)
    assert_close((value, gradient[..., :3]), cut, rtol=1e-10, atol=1e-13)  # order of summation


@pytest.mark.parametrize(("loss", "classes"), LOSSES_WITH_IGNORE_INDEX)
def test_loss_of_completely_ignored_batch_is_zero(loss: Loss, classes: int) -> None:
    output = make_logits(2, classes, 5, 4)
    target = torch.full((2, 5, 4), IGNORE_INDEX)
    value, gradient = loss_and_gradient(loss, output, target)
    assert value == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("loss", [FocalLoss(0.0), DiceCrossEntropyLoss(0.0, ignore_index=-100)])
def test_ignore_index_matches_cross_entropy(loss: Loss) -> None:
    output, target = make_logits(2, 3, 5, 4), make_labels(2, 5, 4)
    target[0] = -100
    target[1, 2] = -100
    assert_matches(loss, nn.CrossEntropyLoss(), output, target)


@pytest.mark.parametrize(
    "loss",
    [
        DiceLoss(),
        DiceCrossEntropyLoss(),
        FocalLoss(alpha=[1, 2, 4]),
        BinaryFocalLoss(),
        KLDivLoss(),
    ],
)
def test_loss_of_bfloat16_outputs_is_computed_in_float32(loss: Loss) -> None:
    output = make_logits(2, 3, 40, 40).bfloat16()
    floating = isinstance(loss, (BinaryFocalLoss, KLDivLoss))
    target = (
        make_logits(2, 3, 40, 40).flip(0).softmax(dim=1) if floating else make_labels(2, 40, 40)
    )
    value = loss(output, target)
    assert value.dtype == torch.float32
    exact = loss(output.double(), target)
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)  # float32's own rounding


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(DiceLoss, smooth=0.0), r"smooth=0\.0 must be above 0"),
        (partial(DiceLoss, smooth=math.nan), "smooth=nan must be above 0"),
        (partial(DiceCrossEntropyLoss, smooth=-1.0), r"smooth=-1\.0 must be above 0"),
        (partial(DiceCrossEntropyLoss, dice_weight=-1.0), r"dice_weight=-1\.0 must be at least 0"),
        (
            partial(DiceCrossEntropyLoss, 1.0, math.inf),
            "cross_entropy_weight=inf must be at least 0",
        ),
        (partial(FocalLoss, gamma=-0.5), r"gamma=-0\.5 must be at least 0"),
        (partial(FocalLoss, alpha=[]), r"alpha=\[\] must have"),
        (partial(FocalLoss, alpha=[1.0, -1.0]), r"alpha=\[1\.0, -1\.0\] must have"),
        (partial(BinaryFocalLoss, gamma=math.nan), "gamma=nan must be at least 0"),
        (partial(BinaryFocalLoss, alpha=1.5), r"alpha=1\.5 must be between 0 and 1"),
        (partial(KLDivLoss, temperature=0.0), r"temperature=0\.0 must be above 0"),
        (partial(KLDivLoss, targets="odds"), "must be one of: logits, prob"),  # type: ignore[arg-type]
    ],
)
def test_arguments_out_of_range_raise(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("loss", "target", "message"),
    [
        (
            DiceLoss(),
            make_labels(2, 1, 5),
            r"target has shape \[2, 1, 5\].* must be \[2, 5\], as labels",
        ),
        (DiceLoss(), make_logits(2, 1, 5), r"must be \[2, 3, 5\], as probabilities"),
        (DiceCrossEntropyLoss(), make_labels(2, 4), r"must be \[2, 5\], as labels"),
        (FocalLoss(), make_labels(2, 4), r"integer labels of shape \[2, 5\]"),
        (FocalLoss(), make_logits(2, 5), r"target is torch\.float64"),
        (FocalLoss(alpha=[1.0, 1.0]), make_labels(2, 5), "2 values, but there are 3 classes"),
        (BinaryFocalLoss(), make_logits(2, 1, 5), "must be the same as input size"),
        (KLDivLoss(), make_logits(2, 1, 5), r"target has shape \[2, 1, 5\], output \[2, 3, 5\]"),
    ],
)
def test_targets_of_wrong_shape_or_dtype_raise(loss: Loss, target: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(make_logits(2, 3, 5), target)


@pytest.mark.parametrize(
    "name", ["bce", "dice", "dice_ce", "focal", "huber", "kl_div", "l1", "nll", "smooth_l1"]
)
def test_loss_config_instantiates_one_term(name: str) -> None:
    node = OmegaConf.load(Path(__file__).parents[3] / "conf" / "loss" / f"{name}.yaml")
    config = OmegaConf.create({"loss": node, "data": {"class_weights": None}})
    terms = Instantiator().build_all("loss", OmegaConf.to_container(config.loss, resolve=True))
    assert list(terms) == [name]
    assert isinstance(terms[name], Term)
    assert isinstance(terms[name].function, nn.Module)
