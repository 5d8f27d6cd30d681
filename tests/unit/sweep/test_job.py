"""Names, hashes and values of the jobs of a sweep."""

from __future__ import annotations

import re

import pytest

from app.config.overrides import parse_overrides
from app.sweep.job import new_job, parse_value, short_name, values_hash


@pytest.mark.parametrize(
    "values",
    [
        {"optimizer.lr": "0.1", "model": "lenet"},
        {"data.path": "some/where/else", "name": "'a=b,c d'"},
        {"model.hidden": "[128,64]", "+x": "{a:1,b:'é'}"},
        {"name": "x" * 500},
    ],
)
def test_new_job_folder_needs_no_quotes_in_override(values: dict[str, str]) -> None:
    job = new_job(3, values)
    assert re.fullmatch(r"3_[A-Za-z0-9_.-]+_[0-9a-f]{8}", job.folder)
    assert len(job.folder) < 100
    (override,) = parse_overrides([f"ckpt=outputs/sweeps/{job.folder}"])
    assert override.value() == f"outputs/sweeps/{job.folder}"
    assert not override.is_sweep_override()


def test_short_name_contains_keys_and_values() -> None:
    assert short_name({"optimizer.lr": "0.1", "model": "lenet"}) == "lr-0.1_model-lenet"
    assert short_name({"a.x": "1", "b.x": "2"}) == "a.x-1_b.x-2"
    assert short_name({"optimizer.lr": "0.0012345678901"}) == "lr-0.001235"


def test_values_hash_depends_on_values_only() -> None:
    assert values_hash({"a": "1", "b": "2"}) == values_hash({"b": "2", "a": "1"})
    assert values_hash({"a": "1"}) != values_hash({"a": "2"})
    assert new_job(0, {"a": "1"}).hash == new_job(7, {"a": "1"}).hash


NUMBERS = "0 -0 +5 007 1_000 1e3 1e-5 1E+5 1e05 .5 5. 0.5 -0.1 00.1 1.e3 inf -inf 0x1"
WORDS = "true True NULL none abc a_b1 _x e5 a-b a.b 1a 'quoted' [1,a] {a:1}"


@pytest.mark.parametrize("text", ["", *NUMBERS.split(), *WORDS.split()])
def test_parse_value_equals_value_of_override(text: str) -> None:
    (override,) = parse_overrides([f"key={text}"])
    value = override.value()
    assert (parse_value(text), type(parse_value(text))) == (value, type(value))
