"""Swept keys of a command line, and the values of each job."""

from __future__ import annotations

import pytest
from hydra._internal.utils import get_args_parser

from app.config import resolvers
from app.config.compose import open_composer
from app.config.overrides import grid, grid_issues, parse_space
from app.runtime.errors import ConfigError
from tests.support.runs import config_issues


def test_grid_last_key_varies_fastest() -> None:
    space = parse_space(["a=1,2", "model=mlp", "b=x,y"], {})
    rows = grid(space, [])
    assert [(row["a"], row["b"]) for row in rows] == [
        ("1", "x"),
        ("1", "y"),
        ("2", "x"),
        ("2", "y"),
    ]
    assert space.overrides_for(rows[1]) == ["a=1", "model=mlp", "b=y"]
    assert space.fixed == ["model=mlp"]


def test_grid_zip_group_varies_keys_together() -> None:
    space = parse_space(["a=1,2", "seed=0,1", "b=x,y"], {})
    rows = grid(space, [["a", "b"]])
    assert [tuple(row[key] for key in ("a", "seed", "b")) for row in rows] == [
        ("1", "0", "x"),
        ("1", "1", "x"),
        ("2", "0", "y"),
        ("2", "1", "y"),
    ]


def test_parse_space_override_wins_over_sweeper_params() -> None:
    space = parse_space(["a=3"], {"a": "1,2", "b": "range(3)"})
    assert grid(space, []) == [{"b": "0"}, {"b": "1"}, {"b": "2"}]
    assert space.overrides_for({"b": "1"}) == ["a=3", "b=1"]


def test_coverage_jobs_have_each_value_once_and_ends_of_ranges() -> None:
    space = parse_space(["a=1,2,3", "seed=range(1000)", "lr=interval(0.1,1)"], {})
    assert space.coverage_jobs() == [
        ["a=1", "seed=0", "lr=0.1"],
        ["a=2", "seed=0", "lr=0.1"],
        ["a=3", "seed=0", "lr=0.1"],
        ["a=1", "seed=999", "lr=0.1"],
        ["a=1", "seed=0", "lr=1.0"],
    ]


@pytest.mark.parametrize(
    "values", ["0,100002", "0,inf", "0,nan", "0,10,0", "0,1,1e-300", "0,1" + "0" * 400]
)
def test_parse_space_of_a_range_that_is_too_long_or_endless_fails(values: str) -> None:
    with pytest.raises(ConfigError, match="is a range without an end, or of more than 100,000"):
        parse_space([f"seed=range({values})"], {})


def test_grid_of_too_many_jobs_is_refused() -> None:
    space = parse_space([f"{key}=range(0,400)" for key in "abc"], {})
    assert [*map(str, grid_issues(space, []))] == [
        "the sweep has 64,000,000 jobs; allowed: 100,000"
    ]
    assert grid_issues(space, [["a", "b", "c"]]) == []


@pytest.mark.parametrize("text", ["mode=glob(*)", "model=glob(zzz*)", "seed=range(5,1)"])
@pytest.mark.parametrize("options", [["-m"], ["model=zzz"]])
def test_sweep_without_values_is_one_error(options: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_issues(*options, text)
    assert [str(issue) for issue in error.value.issues] == [f"{text} has no values to sweep over"]


def test_grid_glob_expands_to_group_options() -> None:
    resolvers.register()
    words = ["-m", "experiment=glob(mnist_alexnet*)"]
    with open_composer(get_args_parser().parse_args(words)) as composer:
        rows = grid(composer.space, [])
    assert rows == [{"experiment": "mnist_alexnet"}, {"experiment": "mnist_alexnet_sgd"}]


def test_composer_sweep_in_yaml_needs_no_multirun_flag() -> None:
    resolvers.register()
    with open_composer(get_args_parser().parse_args(["sweep=lr_grid", "model=mlp"])) as composer:
        assert composer.is_sweep
        assert len(grid(composer.space, [])) == 21
        overrides = composer.space.overrides_for({"optimizer.lr": "1e-1", "seed": "2"})
        assert overrides[-1] == "model=mlp"
