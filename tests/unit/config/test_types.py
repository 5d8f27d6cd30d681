"""Checks of plain values against dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Gt, Lt

from app.config.schema import STRICT, Config, Limit, MonitorConfig, Positive
from app.config.types import UNKNOWN, iter_fields, iter_issues, to_dataclass


@dataclass(frozen=True)
class Group:
    __pydantic_config__ = STRICT
    size: Positive
    rate: float = 0.5
    limit: Limit = None
    share: Annotated[float, Gt(0.0), Lt(1.0)] = 0.5
    on: bool = True
    devices: Literal["auto"] | list[Positive] | None = None
    monitors: dict[str, MonitorConfig | None] | None = None


@pytest.mark.parametrize(
    ("value", "issue"),
    [
        ({}, "g.size is missing; allowed: an integer of at least 1"),
        ({"size": True}, "g.size=True is not valid; allowed: an integer of at least 1"),
        ({"size": "3"}, "g.size='3' is not valid; allowed: an integer of at least 1"),
        ({"size": 3.0}, "g.size=3.0 is not valid; allowed: an integer of at least 1"),
        ({"size": None}, "g.size=None is not valid; allowed: an integer of at least 1"),
        ({"size": "???"}, "g.size has no value; set it with g.size=... on the command line"),
        ({"size": 2**64}, f"g.size={2**64} is too large for a checkpoint; allowed: 64 bits"),
        ({"size": 16**5000}, "g.size is too large for a checkpoint"),
        ({"size": b"x"}, "g.size=b'x' is not valid; allowed: an integer of at least 1"),
        ({"size": 1, "rate": False}, "g.rate=False is not valid; allowed: a number"),
        ({"size": 1, "on": 1}, "g.on=1 is not valid; allowed: true or false"),
        (
            {"size": 1, "limit": 0.0},
            "g.limit=0.0 is not valid; allowed: an integer of at least 1, or a number above 0 and "
            "at most 1, or null",
        ),
        (
            {"size": 1, "share": 1.0},
            "g.share=1.0 is not valid; allowed: a number above 0 and below 1",
        ),
        ({"size": 1, "devices": [1, 0]}, "g.devices.1=0 is not valid; allowed: an integer of at"),
        ({"size": 1, "devices": "aut"}, "or null; did you mean 'auto'?"),
        ({"size": 1, "monitors": {"a": 3}}, "g.monitors.a=3 is not valid; allowed: a group of"),
        ({"size": 1, "monitors": {"a": {"metric": "f"}}}, "g.monitors.a.mode is missing; allowed:"),
        ({"size": 1, "szie": 2}, "g.szie=2 is not a known key; g has: devices, limit, monitors"),
    ],
)
def test_iter_issues_invalid_value_is_named_once(value: dict[str, Any], issue: str) -> None:
    (found,) = iter_issues("g", value, Group)
    assert issue in str(found)


def test_iter_issues_valid_or_unknown_values_have_none() -> None:
    value = {"size": 2, "rate": 3, "limit": 0.5, "monitors": {"a": None}}
    assert list(iter_issues("g", value, Group)) == []
    assert to_dataclass(value, Group) == Group(2, 3.0, 0.5, monitors={"a": None})
    assert list(iter_issues("g", {"size": UNKNOWN, "on": UNKNOWN}, Group)) == []


def test_iter_fields_yields_groups_before_their_keys() -> None:
    assert list(iter_fields(MonitorConfig)) == [("metric",), ("mode",)]
    fields = list(iter_fields(Config))
    assert fields.index(("data",)) < fields.index(("data", "split")) < len(fields)
    assert ("data", "split", "seed") in fields
    assert ("checkpoint", "monitors", "metric") not in fields
