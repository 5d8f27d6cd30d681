"""Nested tuples, lists and dicts of tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from app.runtime.errors import UserError
from app.runtime.nested import describe, iter_tensors, map_tensors, pick, replace, slice_batch


def test_slice_batch_slices_tensors_and_names_and_keeps_scalars() -> None:
    batch = {"x": torch.arange(4), "names": ["a", "b", "c", "d"], "scale": torch.tensor(2.0)}
    part = slice_batch((batch, [torch.arange(8).view(4, 2)]), slice(1, 3), 4)
    assert part[0]["names"] == ["b", "c"]
    assert part[0]["x"].tolist() == [1, 2]
    assert part[0]["scale"] == 2.0
    assert part[1][0].tolist() == [[2, 3], [4, 5]]


def test_pick_accepts_index_name_path_list_and_dict() -> None:
    nested = ({"a": torch.zeros(2), "b": [torch.ones(3), torch.ones(4)]}, torch.ones(5))
    assert pick(nested, None) is nested
    assert pick(nested, 1).shape == (5,)
    assert pick(nested, "0.b.1").shape == (4,)
    assert [part.shape[0] for part in pick(nested, [1, "0.a"])] == [5, 2]
    assert pick(nested, {"x": 1})["x"].shape == (5,)
    assert [len(tensor) for tensor in iter_tensors(nested)] == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (2, "there is no item 2 in a tuple of a float32 tensor of shape"),
        ("0.diget", "there is no 'diget'; available: digit; did you mean 'digit'"),
        ("1.x", "there is no 'x' in a float32 tensor"),
    ],
)
def test_pick_with_missing_key_names_what_is_available(key: Any, message: str) -> None:
    nested = ({"digit": torch.zeros(2)}, torch.zeros(3))
    if key == 2:
        nested = (torch.zeros(2), torch.zeros(3))  # type: ignore[assignment]
    with pytest.raises(UserError, match=message):
        pick(nested, key)


def test_replace_and_map_tensors_keep_the_structure() -> None:
    assert replace((1, 2, 3), 1, 9) == (1, 9, 3)
    assert replace([1, 2], 0, 9) == [9, 2]
    assert replace({"a": 1, "b": 2}, "b", 9) == {"a": 1, "b": 9}
    assert replace(({"a": [1, 2]}, 3), "0.a.1", 9) == ({"a": [1, 9]}, 3)
    assert replace((1, 2), -1, 9) == replace((1, 2), "1", 9) == (1, 9)
    with pytest.raises(UserError, match="there is no 'c'"):
        replace({"a": 1}, "c", 9)
    mapped = map_tensors(lambda t: t + 1, {"a": (torch.zeros(1), "text"), "b": [torch.ones(1)]})
    assert describe(mapped) == (
        "a dict of 'a': a tuple of a float32 tensor of shape [1], a str, "
        "'b': a list of a float32 tensor of shape [1]"
    )
