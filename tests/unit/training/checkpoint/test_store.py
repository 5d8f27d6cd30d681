"""Files of tensors and plain values."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from app.runtime.errors import UserError
from app.training.checkpoint.header import CheckpointInfo, read_info, verify_checksum
from app.training.checkpoint.store import DTYPES, read_store, write_store
from tests.support.hostile_files import SAMPLE_VALUE, is_identical

INFO = CheckpointInfo("state", 3, 7)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.safetensors"


def save(path: Path, content: dict[str, Any]) -> None:
    with path.open("wb") as file:
        write_store(file, path.name, INFO, content)


def test_read_store_returns_identical_value(path: Path) -> None:
    save(path, SAMPLE_VALUE)
    info, content = read_store(path)
    assert info == INFO == read_info(path)
    assert is_identical(content, SAMPLE_VALUE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_read_store_keeps_dtypes_and_bits(path: Path, dtype: torch.dtype) -> None:
    value = torch.arange(2).to(dtype)
    save(path, {"value": value})
    found = read_store(path)[1]["value"]
    assert found.dtype == dtype
    assert found.view(torch.uint8).tolist() == value.view(torch.uint8).tolist()


def test_safetensors_library_reads_tensors_by_name(path: Path) -> None:
    model = {"layer.weight": torch.rand(3, 2), "layer.steps": torch.tensor(5)}
    save(path, {"model": model, "epoch": 1})
    found = load_file(path)
    assert found.keys() == {"model.layer.weight", "model.layer.steps"}
    assert all(torch.equal(found[f"model.{name}"], model[name]) for name in model)


def test_write_store_stores_tied_tensors_once(path: Path) -> None:
    tied = torch.zeros(300)
    save(path, {"encoder": tied, "decoder": tied.detach(), "other": torch.zeros(300)})
    content = read_store(path)[1]
    assert content["encoder"] is content["decoder"]
    assert content["other"] is not content["encoder"]
    assert load_file(path).keys() == {"encoder", "other"}
    assert path.stat().st_size < 3 * 1200


def test_read_store_returns_tensors_that_do_not_depend_on_the_file(path: Path) -> None:
    save(path, {"value": torch.ones(1000)})
    value = read_store(path)[1]["value"]
    path.write_bytes(bytes(path.stat().st_size))
    assert value.sum() == 1000


def test_verify_checksum_detects_any_changed_byte_and_truncation(path: Path) -> None:
    save(path, {"a": torch.arange(3)})
    assert verify_checksum(path) == INFO
    content = path.read_bytes()
    for index in range(len(content)):
        path.write_bytes(content[:index] + bytes([content[index] ^ 4]) + content[index + 1 :])
        with pytest.raises(UserError):
            verify_checksum(path)
    for length in random.Random(0).sample(range(len(content)), 200):
        path.write_bytes(content[:length])
        with pytest.raises(UserError):
            verify_checksum(path)


@pytest.mark.parametrize(
    "value",
    [{1}, b"x", np.float64(1), {("a", 1): 2}, [1j], torch.empty(1, dtype=torch.float8_e4m3fnuz)],
)
def test_write_store_with_unsupported_type_names_key(path: Path, value: Any) -> None:
    save(path, {"task": {"a": [torch.ones(1), 1, 0.5, "x", None, (True,)]}})
    with pytest.raises(UserError, match=r"^task\.a.*cannot be saved"):
        save(path, {"task": {"a": value}})


def test_write_store_takes_one_element_of_any_stride(path: Path) -> None:
    value = torch.arange(4.0).reshape(1, 4)[:, 2]
    assert value.stride() == (4,)
    save(path, {"slice": value, "expanded": torch.tensor(3.0).expand(1)})
    content = read_store(path)[1]
    assert (content["slice"].tolist(), content["expanded"].tolist()) == ([2.0], [3.0])


def deep(levels: int) -> Any:
    return [deep(levels - 1)] if levels else []


@pytest.mark.parametrize("value", [2**65, deep(70), [0] * 5_000_000])
def test_write_store_refuses_what_cannot_be_read(path: Path, value: Any) -> None:
    with pytest.raises(UserError, match="the state to save"):
        save(path, {"task": value})


def test_write_store_takes_names_that_are_not_unicode(path: Path) -> None:
    save(path, {"task": {"a\udcff": torch.ones(1)}})
    assert read_store(path)[1]["task"]["a\udcff"].tolist() == [1.0]
