"""The KL divergence and its gradient, compared with SciPy."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from scipy.stats import entropy
from torch import nn
from torch.testing import assert_close

from app.losses.kl_divergence import KLDivLoss
from tests.support.losses import (
    SHAPES,
    loss_and_gradient,
    make_labels,
    make_logits,
)


@pytest.mark.parametrize("shape", SHAPES)
def test_kl_div_loss_matches_scipy(shape: tuple[int, ...]) -> None:
    output, target = make_logits(*shape), make_logits(*shape).flip(0).softmax(dim=1)
    expected = entropy(target.numpy(), output.softmax(dim=1).numpy(), axis=1).mean()
    assert KLDivLoss()(output, target).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_div_loss_with_temperature_matches_scipy(temperature: float) -> None:
    output, target = make_logits(4, 3, 5), make_logits(4, 3, 5).flip(0)
    p, q = ((x / temperature).softmax(dim=1).numpy() for x in (target, output))
    expected = entropy(p, q, axis=1).mean() * temperature**2
    actual = KLDivLoss(temperature, "logits")(output, target)
    assert actual.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_kl_div_loss_gradient_is_difference_of_probabilities(
    temperature: float, shape: tuple[int, ...]
) -> None:
    output, target = make_logits(*shape), make_logits(*shape).flip(0)
    _, gradient = loss_and_gradient(KLDivLoss(temperature, "logits"), output, target)
    q, p = ((x / temperature).softmax(dim=1) for x in (output, target))
    positions = output.numel() / output.shape[1]
    assert_close(gradient, temperature * (q - p) / positions, rtol=1e-10, atol=1e-13)


def test_kl_div_loss_of_all_target_forms_is_equal() -> None:
    output, target = make_logits(4, 3), make_logits(4, 3).flip(0)
    by_logits = loss_and_gradient(KLDivLoss(2.0, "logits"), output, target)
    probabilities = (target / 2).softmax(dim=1)
    by_probabilities = loss_and_gradient(KLDivLoss(2.0), output, probabilities)
    by_logs = loss_and_gradient(KLDivLoss(2.0, "log_probabilities"), output, probabilities.log())
    assert_close(by_probabilities, by_logits, rtol=1e-12, atol=1e-14)  # rounding of exp and log
    assert_close(by_logs, by_logits, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", ["probabilities", "log_probabilities", "logits"])
def test_kl_div_loss_of_one_hot_targets_equals_cross_entropy(form: str) -> None:
    output, target = make_logits(4, 3), make_labels(4)
    one_hot = F.one_hot(target, 3).double()
    converted = one_hot if form == "probabilities" else one_hot.log()
    loss = KLDivLoss(targets=form)  # type: ignore[arg-type]  # one of three literals
    actual = loss_and_gradient(loss, output, converted)
    assert_close(actual, loss_and_gradient(nn.CrossEntropyLoss(), output, target))
