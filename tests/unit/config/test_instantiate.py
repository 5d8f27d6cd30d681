"""Building objects from nodes."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from app.config.instantiate import Instantiator, iter_node_issues
from app.experiment.export import export
from app.runtime.errors import UserError

SUM_METRIC = {"_target_": "torchmetrics.SumMetric"}


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


def test_callback_inside_another_one_receives_what_it_requires(tmp_path: Path) -> None:
    part = {"_target_": "app.callbacks.tables.Tables"}
    for folder, node in (
        (tmp_path, part),
        (tmp_path / "own", {**part, "folder": tmp_path / "own"}),
    ):
        nodes = [{"first": node}]
        assert list(iter_node_issues("callbacks.b", nodes, (), injected=("folder",))) == []
        (built,) = Instantiator()("callbacks.b", nodes, folder=tmp_path)
        assert built["first"].folder == folder


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


@pytest.mark.parametrize("key", ['a" + open("f", "w") + "', "a\nb", "{a}", "'", "a\\b", "a b"])
def test_part_name_that_is_not_plain_is_refused(key: str) -> None:
    part = {"_target_": "torch.nn.ReLU"}
    by_dict = {"_target_": "torch.nn.ModuleDict", "modules": {key: part}}
    by_pairs = {"_target_": "torch.nn.ModuleDict", "modules": [[key, part]]}
    metrics = {"_target_": "torchmetrics.MetricCollection", "metrics": {key: SUM_METRIC}}
    for node in (by_dict, by_pairs, metrics):
        with pytest.raises(UserError, match="cannot name a part; allowed: letters, digits"):
            Instantiator()("model", node)
    assert [issue.key for issue in iter_node_issues("model", by_dict, ())] == ["model.modules"]


def test_part_name_of_trusted_code_is_free_until_it_is_exported(tmp_path: Path) -> None:
    node = {"_target_": "tests.unit.config.test_instantiate.OddNames"}
    model = Instantiator(["tests"])("model", node)
    assert not list(iter_node_issues("model", node, ["tests"]))
    with pytest.raises(
        UserError, match=r"export\.format='torch_export': 'a\"b' cannot name a part"
    ):
        export(model, torch.zeros(2, 3), "torch_export", tmp_path)


class OddNames(nn.Sequential):
    """A model of the user's own whose part has a name that is no identifier."""

    def __init__(self) -> None:
        super().__init__(OrderedDict({'a"b': nn.Linear(3, 3)}))
