"""Nested tuples, lists and dicts of tensors."""

from __future__ import annotations

import torch

from app.runtime.nested import slice_batch


def test_slice_batch_slices_tensors_and_names_and_keeps_scalars() -> None:
    batch = {"x": torch.arange(4), "names": ["a", "b", "c", "d"], "scale": torch.tensor(2.0)}
    part = slice_batch((batch, [torch.arange(8).view(4, 2)]), slice(1, 3), 4)
    assert part[0]["names"] == ["b", "c"]
    assert part[0]["x"].tolist() == [1, 2]
    assert part[0]["scale"] == 2.0
    assert part[1][0].tolist() == [[2, 3], [4, 5]]
