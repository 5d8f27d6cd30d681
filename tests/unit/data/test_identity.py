"""Equal data have equal hashes, and other data have others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from app.data import identity
from app.data.identity import identify_data

X, Y = torch.arange(24).reshape(6, 4), torch.arange(6)


class Files(Dataset[int]):
    """Dataset of files, as image folders are."""

    def __init__(self, root: Path, paths: list[str], targets: list[int]) -> None:
        self.root, self.paths, self.targets = root, paths, targets

    def __len__(self) -> int:
        return len(self.paths)


class Unknown(Dataset[int]):
    def __len__(self) -> int:
        return 3


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield 1


def changed(index: tuple[int, int]) -> TensorDataset:
    x = X.clone()
    x[index] += 1
    return TensorDataset(x, Y)


def test_identify_data_equal_arrays_have_equal_hashes() -> None:
    found = identify_data(TensorDataset(X, Y))
    assert (found.samples, found.hash_of) == (6, "the arrays")
    assert found == identify_data(TensorDataset(X.clone(), Y.clone()))


@pytest.mark.parametrize(
    "other",
    [
        lambda: changed((5, 3)),
        lambda: TensorDataset(X, Y.flip(0)),
        lambda: TensorDataset(X.reshape(6, 2, 2), Y),
        lambda: TensorDataset(X, Y.int()),
        lambda: Subset(TensorDataset(X, Y), [0, 1, 2, 3, 4, 5]),
    ],
)
def test_identify_data_other_arrays_have_another_hash(other: Callable[[], Dataset[int]]) -> None:
    assert identify_data(other()).hash != identify_data(TensorDataset(X, Y)).hash


def test_identify_data_large_array_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "MAX_ARRAY_BYTES", X.numel() * X.element_size() // 2)
    found = identify_data(TensorDataset(X, Y))
    assert found.hash_of == "evenly spaced samples of the arrays"
    assert identify_data(changed((1, 0))).hash == found.hash, "between two of them"
    assert identify_data(changed((2, 0))).hash != found.hash
    assert identify_data(TensorDataset(X[:5], Y[:5])).hash != found.hash


def test_identify_data_files_by_name_size_and_label(tmp_path: Path) -> None:
    names = ["a.png", "b.png"]
    for name in names:
        (tmp_path / name).write_bytes(b"12")
    found = identify_data(Files(tmp_path, names, [0, 1]))
    assert (found.samples, found.hash_of) == (2, "names and sizes of 2 files")
    (tmp_path / "a.png").touch()
    assert identify_data(Files(tmp_path, names, [0, 1])) == found
    assert identify_data(Files(tmp_path, names, [1, 1])).hash != found.hash
    assert identify_data(Files(tmp_path, names[::-1], [0, 1])).hash != found.hash
    subset = identify_data(Subset(Files(tmp_path, names, [0, 1]), [0]))
    assert (subset.samples, subset.hash) != (2, found.hash)
    (tmp_path / "a.png").write_bytes(b"123")
    assert identify_data(Files(tmp_path, names, [0, 1])).hash != found.hash


def test_identify_data_many_files_are_named_but_not_all_sized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "MAX_FILES", 2)
    found = identify_data(Files(tmp_path, ["a", "b", "c"], []))
    assert found.hash_of == "names of 3 files, and sizes of every 2th"
    assert found.hash != identify_data(Files(tmp_path, ["a", "x", "c"], [])).hash


def test_identify_data_unknown_kinds_say_so() -> None:
    assert identify_data(Stream()).hash_of == "nothing: the data are iterable"
    found = identify_data(Unknown())
    assert (found.samples, found.hash) == (3, None)
    assert found.hash_of == "nothing: Unknown has neither files nor arrays"
