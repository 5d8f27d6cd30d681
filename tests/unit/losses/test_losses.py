"""Losses and their gradients are those of other implementations, and of figures by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from monai.losses.dice import DiceCELoss
from monai.losses.dice import DiceLoss as MonaiDiceLoss
from monai.losses.focal_loss import FocalLoss as MonaiFocalLoss
from omegaconf import OmegaConf
from scipy.stats import entropy
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.ops import sigmoid_focal_loss

from app.config.instantiate import Instantiator
from app.losses.dice import DiceCrossEntropyLoss, DiceLoss
from app.losses.focal import BinaryFocalLoss, FocalLoss
from app.losses.kl_divergence import KLDivLoss
from app.losses.weighted_sum import MeanOutputLoss, Term

Loss = Callable[[Tensor, Tensor], Tensor]
SHAPES = [(4, 3), (2, 3, 5, 4), (2, 3, 4, 3, 5)]  # of classes, images, volumes
SPATIAL = SHAPES[1:]
IGNORED = 255


def logits(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=generator)


def labels(*shape: int, classes: int = 3) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(2))


def labels_for(output: Tensor) -> Tensor:
    return labels(len(output), *output.shape[2:], classes=max(output.shape[1], 2))


def with_gradient(loss: Loss, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    output = output.clone().requires_grad_()
    value = loss(output, target)
    (gradient,) = torch.autograd.grad(value, output)
    return value.detach(), gradient


def assert_same(loss: Loss, reference: Loss, output: Tensor, target: Tensor) -> None:
    """In value and gradient; two orders of summation in float64 differ by its rounding."""
    found = with_gradient(loss, output, target)
    expected = with_gradient(reference, output, target)
    assert_close(found, expected, rtol=1e-10, atol=1e-13)


def monai(loss: nn.Module) -> Loss:
    """Labels of MONAI have a dimension for their one channel."""
    return lambda output, target: loss(output, target.unsqueeze(1))


@pytest.mark.parametrize("shape", SPATIAL)
@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("smooth", [1e-5, 1.0])
def test_dice_is_that_of_monai(
    shape: tuple[int, ...], per_sample: bool, background: bool, smooth: float
) -> None:
    reference = MonaiDiceLoss(
        softmax=True,
        to_onehot_y=True,
        include_background=background,
        batch=not per_sample,
        smooth_nr=smooth,
        smooth_dr=smooth,
    )
    output = logits(*shape)
    loss = DiceLoss(smooth, background, per_sample=per_sample)
    assert_same(loss, monai(reference), output, labels_for(output))


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("background", [True, False])
def test_dice_of_a_single_output_is_that_of_the_sigmoid(per_sample: bool, background: bool) -> None:
    reference = MonaiDiceLoss(sigmoid=True, batch=not per_sample)
    output = logits(2, 1, 5, 4)
    loss = DiceLoss(include_background=background, per_sample=per_sample)
    assert_same(loss, monai(reference), output, labels_for(output))


def test_dice_by_hand() -> None:
    output = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0]], dtype=torch.float64)
    # sample 0: p = (1/4, 3/4), label 1; sample 1: p = (3/4, 1/4), label 1; smooth 1
    per_class = [1 - 1 / 1.25, 1 - 2.5 / 2.75, 1 - 1 / 1.75, 1 - 1.5 / 2.25]
    assert DiceLoss(smooth=1.0)(output, torch.tensor([1, 1])).item() == pytest.approx(
        sum(per_class) / 4, rel=1e-12
    )


def test_dice_takes_maps_of_probabilities() -> None:
    output, target = logits(2, 3, 5, 4), logits(2, 3, 5, 4).flip(0).softmax(dim=1)
    reference = MonaiDiceLoss(softmax=True, soft_label=False, smooth_nr=1e-5, smooth_dr=1e-5)
    assert_same(DiceLoss(), reference, output, target)
    one_hot = F.one_hot(labels_for(output), 3).movedim(-1, 1)
    assert torch.equal(DiceLoss()(output, one_hot.double()), DiceLoss()(output, labels_for(output)))


def test_dice_of_a_class_neither_true_nor_predicted_is_zero() -> None:
    output = torch.tensor([[60.0, -60.0, -60.0]], dtype=torch.float64)
    assert DiceLoss()(output, torch.tensor([0])).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shape", SPATIAL)
@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize(("dice", "cross_entropy"), [(1.0, 1.0), (0.25, 2.0), (0.0, 1.0)])
def test_dice_cross_entropy_is_that_of_monai(
    shape: tuple[int, ...], background: bool, dice: float, cross_entropy: float
) -> None:
    reference = DiceCELoss(
        softmax=True,
        to_onehot_y=True,
        include_background=background,
        lambda_dice=dice,
        lambda_ce=cross_entropy,
    )
    output = logits(*shape)
    loss = DiceCrossEntropyLoss(dice, cross_entropy, include_background=background)
    assert_same(loss, monai(reference), output, labels_for(output))


def test_dice_cross_entropy_of_a_single_output_is_binary() -> None:
    output = logits(2, 1, 5, 4)
    reference = DiceCELoss(sigmoid=True)
    assert_same(DiceCrossEntropyLoss(), monai(reference), output, labels_for(output))


def test_dice_cross_entropy_takes_maps_of_probabilities() -> None:
    output, target = logits(2, 3, 5, 4), logits(2, 3, 5, 4).flip(0).softmax(dim=1)
    assert_same(DiceCrossEntropyLoss(dice_weight=0), nn.CrossEntropyLoss(), output, target)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_binary_focal_is_that_of_torchvision(gamma: float, alpha: float | None) -> None:
    output, target = logits(6, 5), labels(6, 5, classes=2).double()
    given = -1 if alpha is None else alpha
    reference = partial(sigmoid_focal_loss, alpha=given, gamma=gamma, reduction="mean")
    assert_same(BinaryFocalLoss(gamma, alpha), reference, output, target)
    assert_same(BinaryFocalLoss(gamma, alpha), reference, output, 0.8 * target + 0.1)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_focal_of_two_classes_is_that_of_one_logit(gamma: float, alpha: float | None) -> None:
    weights = None if alpha is None else [1 - alpha, alpha]

    def two_classes(output: Tensor, target: Tensor) -> Tensor:
        pairs = torch.stack([torch.zeros_like(output), output], dim=1)
        value: Tensor = FocalLoss(gamma, weights)(pairs, target)
        return value

    def one_logit(output: Tensor, target: Tensor) -> Tensor:
        given = -1 if alpha is None else alpha
        value: Tensor = sigmoid_focal_loss(output, target.double(), given, gamma, reduction="mean")
        return value

    assert_same(two_classes, one_logit, logits(8), labels(8, classes=2))


@pytest.mark.parametrize("shape", SPATIAL)
@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("alpha", [None, [0.5, 1.0, 2.0]])
def test_focal_is_that_of_monai(
    shape: tuple[int, ...], gamma: float, alpha: list[float] | None
) -> None:
    mean_over_classes = MonaiFocalLoss(use_softmax=True, to_onehot_y=True, gamma=gamma, alpha=alpha)

    def reference(output: Tensor, target: Tensor) -> Tensor:
        value: Tensor = 3 * mean_over_classes(output, target.unsqueeze(1))
        return value

    output = logits(*shape)
    found = with_gradient(FocalLoss(gamma, alpha), output, labels_for(output))
    expected = with_gradient(reference, output, labels_for(output))
    # MONAI computes in float32
    assert_close(found, expected, rtol=1e-5, atol=1e-7, check_dtype=False)


@pytest.mark.parametrize("shape", SHAPES)
def test_focal_of_gamma_0_is_the_cross_entropy(shape: tuple[int, ...]) -> None:
    output = logits(*shape)
    assert_same(FocalLoss(0.0), nn.CrossEntropyLoss(), output, labels_for(output))
    target = labels_for(output).double().expand(3, *shape[:1], *shape[2:]).transpose(0, 1) % 2
    assert_same(BinaryFocalLoss(0.0), nn.BCEWithLogitsLoss(), output, target)


def test_focal_by_hand() -> None:
    output = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0]], dtype=torch.float64)
    target = torch.tensor([1, 1])  # of probabilities 3/4 and 1/4
    losses = [2 * (1 / 4) ** 2 * math.log(4 / 3), 2 * (3 / 4) ** 2 * math.log(4)]
    found = FocalLoss(2.0, [1.0, 2.0])(output, target)
    assert found.item() == pytest.approx(sum(losses) / 2, rel=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [90.0, 1e4])
def test_focal_gradients_are_finite_where_outputs_are_certain(gamma: float, size: float) -> None:
    output = torch.tensor([[size, -size], [-size, size]])
    for target in (torch.tensor([0, 1]), torch.tensor([1, 0])):
        value, gradient = with_gradient(FocalLoss(gamma), output, target)
        assert torch.isfinite(gradient).all()
        assert torch.isfinite(value)
        one_hot = F.one_hot(target).float()
        value, gradient = with_gradient(BinaryFocalLoss(gamma), output, one_hot)
        assert torch.isfinite(gradient).all()
        assert torch.isfinite(value)


def test_focal_weights_are_no_state_to_save() -> None:
    assert not FocalLoss(alpha=[1.0, 2.0]).state_dict()
    assert len(list(FocalLoss(alpha=[1.0, 2.0]).buffers())) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_divergence_is_that_of_scipy(shape: tuple[int, ...]) -> None:
    output, target = logits(*shape), logits(*shape).flip(0).softmax(dim=1)
    expected = entropy(target.numpy(), output.softmax(dim=1).numpy(), axis=1).mean()
    assert KLDivLoss()(output, target).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergence_by_temperature_is_that_of_scipy(temperature: float) -> None:
    output, target = logits(4, 3, 5), logits(4, 3, 5).flip(0)
    p, q = ((x / temperature).softmax(dim=1).numpy() for x in (target, output))
    expected = entropy(p, q, axis=1).mean() * temperature**2
    found = KLDivLoss(temperature, "logits")(output, target)
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_divergence_gradient_is_the_difference_of_probabilities(
    temperature: float, shape: tuple[int, ...]
) -> None:
    output, target = logits(*shape), logits(*shape).flip(0)
    _, gradient = with_gradient(KLDivLoss(temperature, "logits"), output, target)
    q, p = ((x / temperature).softmax(dim=1) for x in (output, target))
    positions = output.numel() / output.shape[1]
    assert_close(gradient, temperature * (q - p) / positions, rtol=1e-10, atol=1e-13)


def test_divergence_takes_targets_in_three_forms() -> None:
    output, target = logits(4, 3), logits(4, 3).flip(0)
    by_logits = with_gradient(KLDivLoss(2.0, "logits"), output, target)
    probabilities = (target / 2).softmax(dim=1)
    by_probabilities = with_gradient(KLDivLoss(2.0), output, probabilities)
    by_logs = with_gradient(KLDivLoss(2.0, "log_probabilities"), output, probabilities.log())
    assert_close(by_probabilities, by_logits, rtol=1e-12, atol=1e-14)  # rounding of exp and log
    assert_close(by_logs, by_logits, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", ["probabilities", "log_probabilities", "logits"])
def test_divergence_from_certain_targets_is_the_cross_entropy(form: str) -> None:
    output, target = logits(4, 3), labels(4)
    one_hot = F.one_hot(target, 3).double()
    given = one_hot if form == "probabilities" else one_hot.log()
    loss = KLDivLoss(targets=form)  # type: ignore[arg-type]  # one of three texts
    found = with_gradient(loss, output, given)
    assert_close(found, with_gradient(nn.CrossEntropyLoss(), output, target))


def test_identity_is_the_mean_of_the_output() -> None:
    output = logits(4, 3)
    value, gradient = with_gradient(MeanOutputLoss(), output, torch.tensor([]))
    assert value == output.mean()
    assert torch.equal(gradient, torch.full_like(output, 1 / 12))


IGNORING: list[tuple[Loss, int]] = [
    (DiceLoss(ignore_index=IGNORED), 3),
    (DiceLoss(ignore_index=IGNORED), 1),
    (DiceLoss(ignore_index=IGNORED, per_sample=False), 3),
    (DiceCrossEntropyLoss(ignore_index=IGNORED), 3),
    (DiceCrossEntropyLoss(ignore_index=IGNORED), 1),
    (FocalLoss(alpha=[1.0, 2.0, 4.0], ignore_index=IGNORED), 3),
]


@pytest.mark.parametrize(("loss", "classes"), IGNORING)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_outputs_at_ignored_positions_do_not_matter(
    loss: Loss, classes: int, dtype: torch.dtype
) -> None:
    output = logits(2, classes, 5, 4)
    target = labels_for(output)
    ignored = labels(2, 5, 4, classes=2).flip(-1) == 1
    target = target.masked_fill(ignored, IGNORED).to(dtype)
    value, gradient = with_gradient(loss, output, target)
    changed = torch.where(ignored.unsqueeze(1), 3 - 2 * output, output)
    assert loss(changed, target) == value
    everywhere = ignored.unsqueeze(1).expand_as(gradient)
    assert (gradient[everywhere] == 0).all()
    assert (gradient[~everywhere] != 0).all()


@pytest.mark.parametrize(("loss", "classes"), IGNORING)
def test_ignored_positions_might_as_well_be_cut_away(loss: Loss, classes: int) -> None:
    output = logits(2, classes, 5, 4)
    target = labels_for(output)
    cut = with_gradient(loss, output[..., :3], target[..., :3])
    target[..., 3] = IGNORED
    value, gradient = with_gradient(loss, output, target)
    assert_close((value, gradient[..., :3]), cut, rtol=1e-10, atol=1e-13)  # order of summation


@pytest.mark.parametrize(("loss", "classes"), IGNORING)
def test_a_batch_ignored_whole_costs_nothing(loss: Loss, classes: int) -> None:
    output = logits(2, classes, 5, 4)
    target = torch.full((2, 5, 4), IGNORED)
    value, gradient = with_gradient(loss, output, target)
    assert value == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("loss", [FocalLoss(0.0), DiceCrossEntropyLoss(0.0, ignore_index=-100)])
def test_ignored_labels_are_those_of_the_cross_entropy(loss: Loss) -> None:
    output, target = logits(2, 3, 5, 4), labels(2, 5, 4)
    target[0] = -100
    target[1, 2] = -100
    assert_same(loss, nn.CrossEntropyLoss(), output, target)


def test_ignored_positions_of_a_single_output_are_left_out_of_the_mean() -> None:
    output, target = logits(2, 1, 5, 4), labels(2, 5, 4, classes=2)
    target[:, 2] = IGNORED

    def reference(output: Tensor, target: Tensor) -> Tensor:
        kept = target != IGNORED
        return F.binary_cross_entropy_with_logits(output[:, 0][kept], target[kept].double())

    assert_same(DiceCrossEntropyLoss(0.0, ignore_index=IGNORED), reference, output, target)


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
def test_narrow_outputs_are_computed_in_float32(loss: Loss) -> None:
    output = logits(2, 3, 40, 40).bfloat16()
    floating = isinstance(loss, (BinaryFocalLoss, KLDivLoss))
    target = logits(2, 3, 40, 40).flip(0).softmax(dim=1) if floating else labels(2, 40, 40)
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
        (partial(FocalLoss, alpha=[]), r"alpha=\[\] must hold"),
        (partial(FocalLoss, alpha=[1.0, -1.0]), r"alpha=\[1\.0, -1\.0\] must hold"),
        (partial(BinaryFocalLoss, gamma=math.nan), "gamma=nan must be at least 0"),
        (partial(BinaryFocalLoss, alpha=1.5), r"alpha=1\.5 must be between 0 and 1"),
        (partial(KLDivLoss, temperature=0.0), r"temperature=0\.0 must be above 0"),
        (partial(KLDivLoss, targets="odds"), "must be one of: logits, prob"),  # type: ignore[arg-type]
    ],
)
def test_arguments_out_of_range_are_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("loss", "target", "message"),
    [
        (
            DiceLoss(),
            labels(2, 1, 5),
            r"target has shape \[2, 1, 5\].* must be \[2, 5\], as labels",
        ),
        (DiceLoss(), logits(2, 1, 5), r"must be \[2, 3, 5\], as probabilities"),
        (DiceCrossEntropyLoss(), labels(2, 4), r"must be \[2, 5\], as labels"),
        (FocalLoss(), labels(2, 4), r"whole-numbered labels of shape \[2, 5\]"),
        (FocalLoss(), logits(2, 5), r"target is torch\.float64"),
        (FocalLoss(alpha=[1.0, 1.0]), labels(2, 5), "2 values, but there are 3 classes"),
        (BinaryFocalLoss(), logits(2, 1, 5), "must be the same as input size"),
        (KLDivLoss(), logits(2, 1, 5), r"target has shape \[2, 1, 5\], output \[2, 3, 5\]"),
    ],
)
def test_targets_that_would_be_broadcast_are_refused(
    loss: Loss, target: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loss(logits(2, 3, 5), target)


@pytest.mark.parametrize(
    "name", ["bce", "dice", "dice_ce", "focal", "huber", "kl_div", "l1", "nll", "smooth_l1"]
)
def test_the_losses_of_the_configuration_are_built(name: str) -> None:
    node = OmegaConf.load(Path(__file__).parents[3] / "conf" / "loss" / f"{name}.yaml")
    terms = Instantiator().named("loss", OmegaConf.to_object(node))  # type: ignore[arg-type]
    assert list(terms) == [name]
    assert isinstance(terms[name], Term)
    assert isinstance(terms[name].function, nn.Module)
