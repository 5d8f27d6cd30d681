"""Order of samples, and weights for drawing them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from app.data.sampling import (
    BalancedClasses,
    ClassWeights,
    EpochSampler,
    SampleWeights,
    draw_with_replacement,
)
from app.runtime.errors import UserError


def test_epoch_sampler_order_depends_only_on_seed_and_epoch() -> None:
    sampler = EpochSampler.from_limit(100, 10, None, shuffle_seed=7)
    other_batch_size = EpochSampler.from_limit(100, 25, None, 7)
    other_seed = EpochSampler.from_limit(100, 10, None, 8)
    assert torch.equal(sampler.indices(3), other_batch_size.indices(3))
    assert not torch.equal(sampler.indices(3), sampler.indices(4))
    assert not torch.equal(sampler.indices(3), other_seed.indices(3))
    assert sampler.indices(3).sort().values.tolist() == list(range(100))


@pytest.mark.parametrize(
    ("limit", "num_samples"), [(None, 95), (3, 30), (0.5, 50), (0.001, 10), (99, 95)]
)
def test_epoch_sampler_limit_is_number_or_fraction_of_batches(
    limit: int | float | None, num_samples: int
) -> None:
    assert EpochSampler.from_limit(95, 10, limit, None).num_samples == num_samples


def test_balanced_classes_draws_each_class_equally_often() -> None:
    labels = torch.tensor([0] * 900 + [1] * 90 + [3] * 10)
    drawn = labels[draw_with_replacement(BalancedClasses()(labels), 30_000, seed=0)].bincount()
    # Five standard deviations of a count of 10,000 of 30,000: 5 * sqrt(30,000 * 1/3 * 2/3).
    assert (drawn[[0, 1, 3]] - 10_000).abs().max() < 410
    assert drawn[2] == 0


@pytest.mark.parametrize(
    "labels", [torch.rand(3), torch.zeros(2, 2, dtype=torch.int64), torch.tensor([0, -1])]
)
def test_balanced_classes_refuses_invalid_labels(labels: Tensor) -> None:
    with pytest.raises(UserError, match=r"labels are .*; allowed: integers|is negative"):
        BalancedClasses()(labels)


def test_class_weights_are_looked_up_by_label() -> None:
    weights = ClassWeights([1, 0.5, 0])(torch.tensor([2, 0, 1, 1]))
    assert weights.dtype == torch.float64
    assert weights.tolist() == [0, 1, 0.5, 0.5]


def test_class_weights_refuses_invalid_weights() -> None:
    with pytest.raises(UserError, match="-1 at index 0"):
        ClassWeights([-1, 2])
    with pytest.raises(UserError, match="weights has 2 numbers, but the samples have the label 2"):
        ClassWeights([1, 2])(torch.tensor([0, 2]))
    with pytest.raises(UserError, match="weights of the classes that have samples: all are 0"):
        ClassWeights([1, 0])(torch.tensor([1, 1]))


def test_draws_follow_weights() -> None:
    weights = torch.tensor([0.0, 1.0, 2.0, 0.0, 3.0, 4.0, 0.0])
    drawn = draw_with_replacement(weights, 50_000, seed=3)
    assert drawn.dtype == torch.int64
    expected = weights / weights.sum() * 50_000
    counts, drawable = drawn.bincount(minlength=7), weights > 0
    assert counts[~drawable].sum() == 0
    chi_square = ((counts - expected)[drawable].square() / expected[drawable]).sum()
    assert chi_square < 16.27  # exceeded once in a thousand times, for three degrees of freedom


def test_sample_of_weight_0_is_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.tensor([0.0, 0.25], dtype=torch.float64)  # lower ends of the samples' intervals
    monkeypatch.setattr(torch, "rand", lambda *_, **__: points)
    weights = torch.tensor([0.0, 1.0, 0.0, 3.0])
    assert draw_with_replacement(weights, 2, seed=0).tolist() == [1, 3]


def test_draws_depend_only_on_seed_and_keep_global_generator() -> None:
    weights = torch.rand(100)
    first = draw_with_replacement(weights, 50, seed=1)
    torch.rand(7)
    assert torch.equal(draw_with_replacement(weights, 50, seed=1), first)
    assert not torch.equal(draw_with_replacement(weights, 50, seed=2), first)
    before = torch.get_rng_state()
    draw_with_replacement(weights, 50, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_from_more_samples_than_multinomial_supports() -> None:
    weights = torch.zeros(2**24 + 5, dtype=torch.float32)
    weights[-2:] = 1
    drawn = draw_with_replacement(weights, 100, seed=0)
    assert drawn.unique().tolist() == [2**24 + 3, 2**24 + 4]


@pytest.mark.parametrize("text", ["0.5\n1\n2\n", "weight\n0.5\n1\n2\n", "0.5\n1\n2"])
def test_sample_weights_reads_csv(tmp_path: Path, text: str) -> None:
    path = tmp_path / "weights.csv"
    path.write_text(text)
    assert SampleWeights(str(path))(torch.zeros(3)).tolist() == [0.5, 1, 2]


def test_sample_weights_reads_npy(tmp_path: Path) -> None:
    path = tmp_path / "weights.npy"
    np.save(path, np.array([3, 0, 1], np.int32))
    weights = SampleWeights(str(path))(torch.zeros(3))
    assert weights.dtype == torch.float64
    assert weights.tolist() == [3, 0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\n2\n", "has 2 weights, but the dataset has 3 samples"),
        ("1\n-2\n3\n", "-2 at index 1; allowed: finite numbers of at least 0"),
        ("1\ninf\n3\n", "inf at index 1"),
        ("0\n0\n0\n", "all are 0"),
        ("1\nx\n3\n", "line 2: x is not a number"),
        ("1\n\n3\n", "line 2: nan is not a number"),
        ("1,2\n3,4\n5,6\n", "2 columns; allowed: 1"),
        ("", "cannot be read as weights"),
    ],
)
def test_sample_weights_refuses_invalid_csv(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "weights.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        SampleWeights(str(path))(torch.zeros(3))


def test_sample_weights_refuses_other_files(tmp_path: Path) -> None:
    np.save(tmp_path / "square.npy", np.ones((2, 2)))
    (tmp_path / "damaged.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "weights.txt").write_text("1")
    for name, message in {
        "square.npy": r"does not contain a numeric array of shape \(N,\)",
        "damaged.npy": "cannot be read as weights",
        "weights.txt": r"allowed: \.csv, \.npy",
        "none.csv": "is not a file",
    }.items():
        with pytest.raises(UserError, match=message):
            SampleWeights(str(tmp_path / name))(torch.zeros(2))
