"""Search spaces of Optuna studies, and their values on a command line."""

from __future__ import annotations

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from app.config.overrides import parse_overrides, parse_space
from app.sweep.optuna_search import parse_search_space, to_override


def test_parse_search_space_converts_sweeps_to_distributions() -> None:
    expected = {
        "a": (FloatDistribution(0.1, 1.0), "interval(0.1,1)"),
        "b": (FloatDistribution(0.1, 1.0, log=True), "tag(log,interval(0.1,1))"),
        "c": (IntDistribution(1, 8, log=True), "tag(log,int(interval(1,8)))"),
        "d": (IntDistribution(1, 4), "range(1,5)"),
        "e": (IntDistribution(0, 8, step=4), "range(0,10,4)"),
        "f": (CategoricalDistribution([0.1, "x", None, True]), "0.1,x,null,true"),
        "g": (CategoricalDistribution(["[128]", "[64,64]"]), "[128],[64,64]"),
        "h": (FloatDistribution(0.25, 0.75, step=0.25), "range(0.25,1.0,0.25)"),
    }
    space = parse_space([f"{key}={text}" for key, (_, text) in expected.items()], {})
    search_space = parse_search_space(space.swept)
    assert search_space.distributions == {key: dist for key, (dist, _) in expected.items()}
    params = {"a": 0.1 + 0.2, "d": 3, "f": None, "g": "[64,64]"}
    values = {"a": repr(0.1 + 0.2), "d": "3", "f": "null", "g": "[64,64]"}
    assert search_space.to_values(params) == values
    assert search_space.to_values({"f": True})["f"] == "True"


@pytest.mark.parametrize(
    "value",
    [1, True, None, 0.001, "a 'quoted' \\ {text}, [x]=", {"a": [1, "b"], "c": {"d": None}}, []],
)
def test_to_override_is_parsed_to_same_value(value: object) -> None:
    (override,) = parse_overrides([f"+x={to_override(value)}"])
    assert override.value() == value
    assert type(override.value()) is type(value)
