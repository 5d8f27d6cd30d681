"""Splitting and checking of datasets."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from torch.utils.data import TensorDataset

from app.data.split import (
    check_datasets,
    dataset_size,
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
    with pytest.raises(UserError, match="leave none of the 10 training samples"):
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
