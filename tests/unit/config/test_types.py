"""Checks of plain values against types."""

from __future__ import annotations

from app.config.schema import Limit, Positive
from app.config.types import describe_type, matches_type


def test_matches_type_numbers_and_limits() -> None:
    assert matches_type(3, float)
    assert not matches_type(True, int)
    assert not matches_type(0, Positive)
    assert matches_type(None, Limit)
    assert matches_type(0.5, Limit)
    assert not matches_type(0.0, Limit)
    assert describe_type(Positive) == "an integer of at least 1"
