"""Building objects from nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.config.instantiate import Instantiator
from app.runtime.errors import UserError


def test_instantiate_refused_arguments_name_the_node() -> None:
    node = {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.nn.Linear"}]}
    with pytest.raises(UserError, match=r"model\._args_\.0: torch\.nn\.Linear could not be built"):
        Instantiator()("model", node)


def test_instantiate_injects_arguments_only_into_matching_parameters(tmp_path: Path) -> None:
    instantiate = Instantiator()
    tables = instantiate(
        "callbacks.t", {"_target_": "app.callbacks.tables.Tables"}, folder=tmp_path
    )
    console = instantiate(
        "callbacks.c", {"_target_": "app.callbacks.console.Console"}, folder=tmp_path
    )
    assert tables.folder == tmp_path
    assert console is not None


def test_instantiate_partial_node_returns_functools_partial() -> None:
    node = {"_target_": "torch.nn.functional.cross_entropy", "_partial_": True, "reduction": "sum"}
    function = Instantiator()("loss", node)
    assert function.keywords == {"reduction": "sum"}


def test_instantiate_list_of_numbers_becomes_a_tensor_where_one_is_expected() -> None:
    node = {"_target_": "torch.nn.CrossEntropyLoss", "weight": [1, 2.5]}
    assert Instantiator()("loss", node).weight.tolist() == [1.0, 2.5]
    node = {"_target_": "app.losses.focal.FocalLoss", "alpha": [1, 2.5]}
    assert Instantiator()("loss", node).alpha.tolist() == [1.0, 2.5]
    node = {"_target_": "torch.nn.Unflatten", "dim": 1, "unflattened_size": [2, 2]}
    assert Instantiator()("model", node).unflattened_size == [2, 2]
