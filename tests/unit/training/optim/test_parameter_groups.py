"""Division of parameters into groups, and what it does to a run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from app.config.schema import OptimizerOptions, ParameterGroup
from app.runtime.errors import UserError
from app.training.optim.group_table import describe_groups, group_table
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict
from app.training.optim.parameter_groups import (
    batch_size_factor,
    layer_indices,
    make_param_groups,
    scale_learning_rates,
)


class Transformer(nn.Module):
    """Parts of a vision transformer, in the usual order."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 4, 6))
        self.patches = nn.Conv2d(3, 6, 2)
        self.words = nn.Embedding(5, 6)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(6, 1, 8) for _ in range(depth))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Sequential(nn.Linear(6, 2))

    def no_weight_decay(self) -> set[str]:
        return {"position"}


def groups_of(
    model: nn.Module, arguments: dict[str, dict[str, Any]] | None = None, **options: Any
) -> list[dict[str, Any]]:
    given = OptimizerOptions(**options)
    parameters = dict(model.named_parameters())
    return make_param_groups("optimizer", model, parameters, given, arguments or {})


def members(model: nn.Module, **groups: ParameterGroup) -> dict[str, list[str]]:
    return {group["name"]: group["param_names"] for group in groups_of(model, groups=groups)}


def test_parameter_group_is_selected_by_name_module_type_and_dimension() -> None:
    model = Transformer()
    found = members(model, a=ParameterGroup(parameters=["patches", "blocks.*.norm1"]))
    assert found["a"] == [
        *("patches.weight", "patches.bias"),
        *(f"blocks.{i}.norm1.{part}" for i in (0, 1) for part in ("weight", "bias")),
    ]
    inside = members(model, a=ParameterGroup(module_type="MultiheadAttention"))["a"]
    assert {name.partition("self_attn.")[2] for name in inside} == {
        *("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    }
    derived = members(model, a=ParameterGroup(module_type="_ConvNd"))["a"]
    assert derived == ["patches.weight", "patches.bias"]
    assert members(model, a=ParameterGroup(ndim=[3, 4]))["a"] == ["position", "patches.weight"]
    both = members(model, a=ParameterGroup(parameters="patches", ndim=1))
    assert both["a"] == ["patches.bias"]


def test_hidden_weights_are_neither_embeddings_nor_the_output_layer() -> None:
    found = members(Transformer(1), a=ParameterGroup(hidden=True, ndim=2))["a"]
    layers = ("self_attn.in_proj_weight", "self_attn.out_proj.weight")
    assert found == [f"blocks.0.{n}" for n in (*layers, "linear1.weight", "linear2.weight")]


def test_parameter_in_several_groups_belongs_to_the_first_and_others_to_the_default() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first, all_biases = ParameterGroup(parameters="0"), ParameterGroup(parameters="*.bias")
    assert members(model, first=first, biases=all_biases) == {
        "": ["1.weight"],
        "first": ["0.weight", "0.bias"],
        "biases": ["1.bias"],
    }


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"a": ParameterGroup(parameters="haed")},
            "optimizer.groups.a.parameters='haed' matches no trained parameter; the model has: "
            "blocks, .*; did you mean 'head'?",
        ),
        ({"a": ParameterGroup(module_type="Linaer")}, "module_type='Linaer' .* mean 'Linear'?"),
        ({"a": ParameterGroup(ndim=5)}, "ndim=5 matches no .*; the model has: 1, 2, 3, 4"),
        ({"a": ParameterGroup(parameters="head", ndim=4)}, "a matches no trained parameter, alth"),
        (
            {"a": ParameterGroup(parameters="head"), "b": ParameterGroup(parameters="head.0")},
            "groups.b has no parameters: all that it selects are in groups before it: a",
        ),
    ],
)
def test_group_without_parameters_is_an_error_that_names_the_nearest(
    groups: dict[str, ParameterGroup], message: str
) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        groups_of(Transformer(), groups=groups)


def test_no_decay_excludes_vectors_biases_and_what_the_model_names() -> None:
    model = Transformer(1)
    model.map = nn.LayerNorm((2, 3))
    model.batch_bias = nn.Parameter(torch.zeros(2, 2))
    groups = groups_of(
        model,
        {"a": {"weight_decay": 0.3}},
        decay_norm_and_bias=False,
        groups={"a": ParameterGroup(parameters="blocks")},
    )
    decays = {n: group.get("weight_decay") != 0 for group in groups for n in group["param_names"]}
    assert {name for name, decayed in decays.items() if decayed} == {
        *("patches.weight", "words.weight", "head.0.weight"),
        *(f"blocks.0.linear{i}.weight" for i in (1, 2)),
        *("blocks.0.self_attn.in_proj_weight", "blocks.0.self_attn.out_proj.weight"),
    }
    assert {group.get("weight_decay") for group in groups if group["name"] == "a"} == {0.3, 0.0}


def test_layer_decay_of_a_transformer_is_that_of_beit() -> None:
    scales = {
        name: group["lr_scale"]
        for group in groups_of(Transformer(2), layer_decay=0.5)
        for name in group["param_names"]
    }
    depths = {"position": 0, "patches": 0, "words": 0, "blocks.0": 1, "blocks.1": 2}
    for name, scale in scales.items():
        depth = next((d for part, d in depths.items() if name.startswith(part)), 3)
        assert scale == 0.5 ** (3 - depth), name


def test_layer_decay_of_a_part_is_counted_from_its_own_last_layer() -> None:
    model = nn.ModuleDict({"a": Transformer(1), "b": nn.Linear(2, 2)})
    parameters = {n: p for n, p in model.named_parameters() if n.startswith("a.")}
    options = OptimizerOptions(layer_decay=0.5, groups={"x": ParameterGroup(hidden=True)})
    groups = make_param_groups("optimizer.a", model, parameters, options, {})
    scales = {name: group["lr_scale"] for group in groups for name in group["param_names"]}
    assert (scales["a.head.0.weight"], scales["a.patches.weight"]) == (1.0, 0.25)
    hidden = {n for group in groups if group["name"] == "x" for n in group["param_names"]}
    assert "a.patches.weight" in hidden
    assert "a.head.0.weight" not in hidden


def test_layers_of_a_convolutional_model_are_its_blocks_with_their_norms() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)
            self.shortcut = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))

    stages = nn.Sequential(nn.Sequential(Block(), Block()), nn.Sequential(Block()))
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), stages, nn.Linear(2, 2))
    layers = layer_indices(model)
    expected = {"0.": 0, "1.": 0, "2.0.0.": 1, "2.0.1.": 2, "2.1.0.": 3, "3.": 4}
    assert all(layers[n] == next(i for p, i in expected.items() if n.startswith(p)) for n in layers)


def test_learning_rates_multiply_own_rate_scale_layer_and_batch_size() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    options = OptimizerOptions(
        groups={"a": ParameterGroup("0", lr_scale=0.1), "b": ParameterGroup("1")},
        layer_decay=0.5,
        lr_base_size=64,
    )
    parameters = dict(model.named_parameters())
    factor = batch_size_factor(options, 128)
    groups = make_param_groups("optimizer", model, parameters, options, {"b": {"lr": 0.3}}, factor)
    optimizer = torch.optim.SGD(groups, lr=1.0)
    scale_learning_rates(optimizer.param_groups, 1.0)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"": 2.0, "a": 2 * 0.25 * 0.1, "b": 2 * 0.5 * 0.3})
    assert [group["lr_scale"] for group in optimizer.param_groups] == pytest.approx(
        [*rates.values()]
    )
    assert OptimWrapper(optimizer).lrs == rates


def test_batch_size_factor_is_linear_or_a_square_root() -> None:
    assert batch_size_factor(OptimizerOptions(), 512) == 1.0
    assert batch_size_factor(OptimizerOptions(lr_base_size=128), 512) == 4.0
    sqrt = OptimizerOptions(lr_base_size=128, lr_base_scale="sqrt")
    assert batch_size_factor(sqrt, 512) == 2.0


def make_wrapper(names: Sequence[str]) -> OptimWrapper:
    """Wrapper of a small model with a group for each module that is named."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = groups_of(model, groups={name: ParameterGroup(name) for name in names})
    optimizer = torch.optim.Adam(groups)
    scale_learning_rates(optimizer.param_groups, 1e-3)
    return OptimWrapper(optimizer)


def test_resume_with_other_groups_names_the_parameter_and_both_groups() -> None:
    wrapper = make_wrapper(["0"])
    state = copy.deepcopy(wrapper.state_dict())
    make_wrapper(["0"]).load_state_dict(state)
    with pytest.raises(UserError) as refused:
        make_wrapper([]).load_state_dict(state)
    assert str(refused.value) == (
        "optimizer: the parameter '0.weight' was in group 1 (0) and is in group 0 (default) now; "
        "a run resumes with its own groups"
    )
    with pytest.raises(UserError, match=r"'0\.weight' was in group 1"):
        make_wrapper(["1"]).load_state_dict(state)  # as many groups of the same size
    for group in state["optimizer"]["param_groups"]:
        del group["param_names"]  # as in a checkpoint of an optimizer that a program built
    make_wrapper(["0"]).load_state_dict(state)


def test_group_table_has_a_row_for_each_parameter_and_a_line_for_each_group() -> None:
    wrappers = OptimWrapperDict({"net": make_wrapper(["1"])})
    table = group_table(wrappers)
    assert table["parameter"].tolist() == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert table["group"].tolist() == ["net: default"] * 2 + ["net: 1"] * 2
    assert describe_groups(table).split("\n")[2].split() == [
        *("net:", "1", "Adam", "0.001", "0", "6", "1.weight,", "1.bias")
    ]
    assert wrappers.lrs() == {"lr_net": 1e-3, "lr_net_1": 1e-3}
