"""Splitting and checking of datasets."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from app.data.split import (
    check_datasets,
    class_weights,
    dataset_size,
    sample_groups,
    split_dataset,
    warn_about_missing_classes,
)
from app.runtime.errors import UserError
from tests.support.toy_datasets import arange_dataset


def test_split_depends_only_on_seed_and_keeps_every_sample() -> None:
    first, same_seed, other_seed = (
        split_dataset({"train": arange_dataset(100)}, 10, 0.2, seed=seed) for seed in (1, 1, 2)
    )
    assert {stage: dataset_size(part) for stage, part in first.items()} == {
        "train": 70,
        "valid": 10,
        "test": 20,
    }
    values = [part.tensors[0].flatten().tolist() for part in first.values()]  # type: ignore[attr-defined]
    assert sorted(chain(*values)) == list(range(100))
    valid, same, other = (s["valid"].tensors[0] for s in (first, same_seed, other_seed))  # type: ignore[attr-defined]
    assert torch.equal(valid, same)
    assert not torch.equal(valid, other)


def test_split_larger_than_dataset_is_refused() -> None:
    with pytest.raises(UserError, match="leave 0 of the 10 training samples; needed: 1"):
        split_dataset({"train": arange_dataset(10)}, 8, 0.2, seed=0)


@pytest.mark.parametrize(
    ("dataset", "num_classes", "message"),
    [
        (TensorDataset(torch.zeros(0, 1), torch.zeros(0).long()), 3, "has no samples"),
        (arange_dataset(), 2, "has the label 2; allowed: 0 to 1"),
        (TensorDataset(torch.zeros(1, 1), torch.tensor([-1])), 3, "has the label -1"),
        (TensorDataset(torch.zeros(1, 1), torch.zeros(1)), 3, "class labels must be integers"),
    ],
)
def test_check_datasets_refuses_empty_data_and_invalid_labels(
    dataset: TensorDataset, num_classes: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_datasets({"train": dataset}, num_classes, 1)


def test_classes_without_samples_are_logged_by_name(caplog: pytest.LogCaptureFixture) -> None:
    warn_about_missing_classes({"train": arange_dataset()}, 5, 1)
    assert "no sample of class 3, 4 in the train data" in caplog.text
    warn_about_missing_classes({"train": arange_dataset()}, 5, 1, ["a", "b", "c", "d", "e"])
    assert "no sample of class d, e in the train data" in caplog.text


def test_stratified_split_has_each_class_in_proportion_and_rare_ones_in_training() -> None:
    labels = torch.tensor([0] * 100 + [1] * 30 + [2] * 10 + [3] * 2 + [4])
    dataset = TensorDataset(torch.arange(len(labels)), labels)
    for seed in range(3):
        parts = split_dataset({"train": dataset}, 0.1, 0.2, seed, labels)
        counts = {
            stage: torch.bincount(part.tensors[1], minlength=5).tolist()  # type: ignore[attr-defined]
            for stage, part in parts.items()
        }
        assert sum(map(sum, counts.values())) == len(labels)
        for stage, share in (("train", 0.7), ("valid", 0.1), ("test", 0.2)):
            for label, total in enumerate((100, 30, 10)):
                assert abs(counts[stage][label] - share * total) <= 1.01, (stage, label)
        assert counts["train"][3] >= 1
        assert counts["train"][4] == 1
    first, again, other = (
        split_dataset({"train": dataset}, 0.1, 0.2, seed, labels)["valid"].tensors[0].tolist()  # type: ignore[attr-defined]
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_check_datasets_refuses_other_class_names() -> None:
    dataset = arange_dataset()
    dataset.classes = ["a", "b", "c"]  # type: ignore[attr-defined]
    check_datasets({"train": dataset}, 3, 1, ["a", "b", "c"])
    with pytest.raises(
        UserError, match=r"\['a', 'c', 'b'\], but data.source.train has the classes"
    ):
        check_datasets({"train": dataset}, 3, 1, ["a", "c", "b"])


def values_of(part: object) -> list[int]:
    assert isinstance(part, TensorDataset)
    return [int(value) for value in part.tensors[0].flatten()]


@pytest.mark.parametrize("grouped", [False, True])
def test_folds_are_disjoint_and_cover_everything_but_the_test_data(grouped: bool) -> None:
    data = arange_dataset(103)
    groups = [index // 2 for index in range(103)] if grouped else None
    parts = [
        split_dataset({"train": data}, 0.5, 13, 0, folds=(4, fold), groups=groups)
        for fold in range(4)
    ]
    tests = [values_of(part["test"]) for part in parts]
    assert tests == tests[:1] * 4
    held_out = [values_of(part["valid"]) for part in parts]
    assert sorted([*chain(*held_out), *tests[0]]) == list(range(103))
    for part, valid in zip(parts, held_out, strict=True):
        assert 22 <= len(valid) <= 24
        assert sorted([*values_of(part["train"]), *valid, *tests[0]]) == list(range(103))


def test_stratified_folds_have_each_class_in_the_same_proportion() -> None:
    labels = torch.tensor([0] * 80 + [1] * 15 + [2] * 5)
    data = TensorDataset(torch.arange(100)[:, None], labels)
    for fold in range(5):
        valid = split_dataset({"train": data}, None, None, 0, labels, (5, fold))["valid"]
        assert torch.bincount(valid.tensors[1]).tolist() == [16, 3, 1]  # type: ignore[attr-defined]


def test_groups_stay_in_one_part_and_parts_keep_the_proportions_of_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(0, 60, (600,), generator=generator).tolist()
    labels = torch.tensor([int(group % 5 == 0) for group in groups])
    data = TensorDataset(torch.arange(600)[:, None], labels)
    parts = split_dataset({"train": data}, 0.2, 0.2, 0, labels, groups=groups)
    owners = [{groups[value] for value in values_of(part)} for part in parts.values()]
    assert not owners[0] & owners[1] and not owners[0] & owners[2] and not owners[1] & owners[2]
    assert sum(map(len, owners)) == len({*groups})
    share = labels.double().mean().item()
    for part, size in zip(parts.values(), (360, 120, 120), strict=True):
        assert dataset_size(part) == pytest.approx(size, abs=15)
        found = part.tensors[1].double().mean().item()  # type: ignore[attr-defined]
        assert found == pytest.approx(share, abs=0.05)


def test_too_few_groups_or_samples_for_the_folds_are_refused() -> None:
    data = {"train": arange_dataset(10)}
    with pytest.raises(UserError, match="2 groups cannot be divided into 3 parts"):
        split_dataset(data, None, None, 0, folds=(3, 0), groups=[0, 1] * 5)
    with pytest.raises(UserError, match="leave 2 of the 10 training samples; needed: 3"):
        split_dataset(data, None, 8, 0, folds=(3, 0))


def test_groups_come_from_the_dataset_or_from_file_names(tmp_path: Path) -> None:
    class Files(arange_dataset().__class__):  # type: ignore[misc]
        root, paths = tmp_path, ["cat/p1_a.png", "cat/p2_a.png", "dog/p1_b.png"]
        groups = ("x", "y", "x")

    data = Files(*arange_dataset(3).tensors)
    assert sample_groups(data, None) == ["x", "y", "x"]
    assert sample_groups(data, "/(p[0-9])_") == ["p1", "p2", "p1"]
    with pytest.raises(UserError, match=r"'cat/\(.\)_' does not match 'cat/p1_a.png'"):
        sample_groups(data, "cat/(.)_")
    with pytest.raises(UserError, match="needs samples that are files"):
        sample_groups(arange_dataset(), "(.)")
    assert sample_groups(arange_dataset(), None) is None


def test_class_weights_are_inverse_to_the_frequency() -> None:
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    data = TensorDataset(torch.zeros(10, 1), labels)
    weights = torch.tensor(class_weights(data, 1, 3, 1.0))
    torch.testing.assert_close(weights, torch.tensor([10 / 18, 10 / 9, 10 / 3]), atol=1e-5, rtol=0)
    assert weights[labels].mean().item() == pytest.approx(1, abs=1e-5)
    assert class_weights(data, 1, 3, 0.5) == pytest.approx(weights.sqrt().tolist(), abs=1e-5)
    masks = TensorDataset(torch.zeros(2, 1), torch.tensor([[0, 0, 1], [0, 2, 255]]))
    assert class_weights(masks, 1, 3, 1.0) == pytest.approx([5 / 9, 5 / 3, 5 / 3], abs=1e-5)
    several = TensorDataset(torch.zeros(4, 1), torch.tensor([[1.0, 0], [0, 0], [0, 1], [0, 1]]))
    assert class_weights(several, 1, 2, 1.0) == [3.0, 1.0]
    with pytest.raises(UserError, match="no sample of class 3"):
        class_weights(data, 1, 4, 1.0)
