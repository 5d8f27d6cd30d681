"""Untrusted checkpoints load exactly as saved or fail with a clear error, and run no code."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from app.runtime.errors import UserError
from app.training.checkpoint.checkpoint import find_problem, load_checkpoint
from app.training.checkpoint.store import read_store
from tests.support.hostile_files import (
    SAMPLE_VALUE,
    MaliciousPickle,
    checkpoint_bytes,
    is_identical,
    make_safetensors,
    make_store,
    with_checksum,
)
from tests.support.processes import SUPPORT_DIR

GOOD = checkpoint_bytes(SAMPLE_VALUE)
FUZZ = settings(
    max_examples=100,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
MUCH_FUZZ = settings(FUZZ, max_examples=5000)


def load_or_none(folder: Path, content: bytes) -> Any:
    """Load a file; return None if it is refused, by a `UserError` of one line."""
    file = folder / "a.safetensors"
    file.write_bytes(content)
    try:
        return read_store(file)[1]
    except UserError as error:
        assert str(error).startswith(f"{file}")
        assert str(error).isprintable()
        assert len(str(error)) < 400
        return None


def error_of(folder: Path, content: bytes) -> str:
    """Return the error message for a file that must be refused."""
    (folder / "a.safetensors").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_store(folder / "a.safetensors")
    return str(caught.value)


# ---- damaged files


def check_flipped(folder: Path, index: int, bits: int) -> None:
    """Flip bits of a file, once under the old checksum and once under a right one."""
    content = bytearray(GOOD)
    content[index] ^= bits
    assert load_or_none(folder, bytes(content)) is None
    load_or_none(folder, with_checksum(bytes(content)))


def check_moved(folder: Path, first: int, second: int, length: int) -> None:
    """Overwrite a piece of the file with another one, or remove it."""
    piece = GOOD[first : first + length]
    for content in (
        GOOD[:second] + piece + GOOD[second + length :],
        GOOD[:first] + GOOD[first + length :],
    ):
        assert content == GOOD or load_or_none(folder, content) is None
        load_or_none(folder, with_checksum(content))


INDEX = st.integers(0, len(GOOD) - 1)
BITS = st.integers(1, 255)
LENGTHS = st.integers(1, 200)


def test_read_store_returns_identical_value(tmp_path: Path) -> None:
    assert is_identical(load_or_none(tmp_path, GOOD), SAMPLE_VALUE)


@FUZZ
@given(length=INDEX)
def test_truncated_file_is_refused(tmp_path: Path, length: int) -> None:
    assert load_or_none(tmp_path, GOOD[:length]) is None
    load_or_none(tmp_path, with_checksum(GOOD[:length]))


@FUZZ
@given(index=INDEX, bits=BITS)
def test_flipped_bits_are_refused(tmp_path: Path, index: int, bits: int) -> None:
    check_flipped(tmp_path, index, bits)


@FUZZ
@given(first=INDEX, second=INDEX, length=LENGTHS)
def test_moved_or_missing_pieces_are_refused(
    tmp_path: Path, first: int, second: int, length: int
) -> None:
    check_moved(tmp_path, first, second, length)


@pytest.mark.long
def test_file_truncated_at_every_length_is_refused(tmp_path: Path) -> None:
    for length in range(len(GOOD)):
        assert load_or_none(tmp_path, GOOD[:length]) is None


@pytest.mark.long
def test_every_byte_flipped_is_refused(tmp_path: Path) -> None:
    for index in range(len(GOOD)):
        for bits in (*(1 << bit for bit in range(8)), 255):
            check_flipped(tmp_path, index, bits)


@pytest.mark.long
@MUCH_FUZZ
@given(first=INDEX, second=INDEX, length=LENGTHS)
def test_many_moved_pieces_are_refused(
    tmp_path: Path, first: int, second: int, length: int
) -> None:
    check_moved(tmp_path, first, second, length)


VALUES = st.recursive(
    st.sampled_from([None, True, 0, -1, 2**64 - 1, 0.5, float("nan"), "", "w", "$tensor"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["$tensor", "$complex", "$tuple", "$items", "a", "w"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=10,
)


def check_values(folder: Path, value: Any) -> None:
    tensors = '"w":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}'
    load_or_none(folder, make_store(json.dumps({"value": value}), tensors, bytes(8)))


@FUZZ
@given(value=VALUES)
def test_any_values_with_right_checksum_load_or_are_refused(tmp_path: Path, value: Any) -> None:
    check_values(tmp_path, value)


@pytest.mark.long
@MUCH_FUZZ
@given(value=VALUES)
def test_many_values_with_right_checksum_load_or_are_refused(tmp_path: Path, value: Any) -> None:
    check_values(tmp_path, value)


# ---- attacks


def pickle_bytes(protocol: int) -> bytes:
    return pickle.dumps({"model": MaliciousPickle()}, protocol)


def torch_save_bytes(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.usefixtures("tmp_cwd")
@pytest.mark.parametrize("content", [*map(pickle_bytes, range(6)), torch_save_bytes([1])])
def test_pickle_under_the_name_of_a_checkpoint_is_refused(content: bytes) -> None:
    Path("evil.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"evil\.safetensors is truncated or not a checkpoint"):
        load_checkpoint(Path("evil.safetensors"))
    assert not Path("was_here").exists()


@pytest.mark.parametrize("name", ["", ".metadata", "__0_0.distcp"])
def test_load_checkpoint_refuses_torch_distributed_checkpoint(tmp_cwd: Path, name: str) -> None:
    (tmp_cwd / ".metadata").write_bytes(pickle.dumps(MaliciousPickle()))
    (tmp_cwd / "__0_0.distcp").write_bytes(GOOD)
    with pytest.raises(UserError, match=r"is a torch\.distributed\.checkpoint"):
        load_checkpoint(tmp_cwd / name)
    assert not Path("was_here").exists()


def test_safetensors_of_another_program_are_refused(tmp_path: Path) -> None:
    weights = {"weight": torch.zeros(2)}
    for content in (save(weights), save(weights, {"format": "pt"})):
        assert "is not a checkpoint of this program" in error_of(tmp_path, content)


def entry(dtype: str, shape: object, start: int, end: int, name: str = "w") -> str:
    values = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return f'"{name}":{json.dumps(values)}'


CONTENT_OF_W = '{"w":{"$tensor":"w"}}'


@pytest.mark.parametrize(
    ("tensors", "data"),
    [
        (entry("F32", [4], 0, 16), 8),  # beyond the end of the file
        (entry("F32", [2], 0, 8), 16),  # bytes that belong to no tensor
        (entry("F32", [5], 0, 16), 16),
        (entry("F32", [2**62, 4], 0, 16), 16),
        (entry("F32", [2**40], 0, 2**42), 16),
        (entry("F32", [-4], 0, 16), 16),
        (entry("F32", [4], 16, 0), 16),
        (entry("F32", [4.0], 0, 16), 16),
        (entry("F99", [4], 0, 16), 16),
        (entry("F32", [1], 0, 4) + "," + entry("F32", [1], 0, 4, "v"), 4),  # overlapping
        (entry("F32", [1], 0, 4) + "," + entry("F32", [1], 8, 12, "v"), 12),  # a gap
        (entry("F32", [1], 0, 4) + "," + entry("F32", [1], 4, 8), 8),  # the same name twice
        ('"__metadata__":{"format":"4"}', 0),
        ('"w":' + "[" * 100_000, 0),
        ('"w":3', 0),
    ],
)
def test_header_with_false_sizes_or_names_is_refused(
    tmp_path: Path, tensors: str, data: int
) -> None:
    message = error_of(tmp_path, make_store(CONTENT_OF_W, tensors, bytes(data)))
    assert "is truncated or not a checkpoint" in message


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8 + 1, 10**6])
def test_false_header_length_is_refused(tmp_path: Path, length: int) -> None:
    content = length.to_bytes(8, "little") + GOOD[8:]
    assert "is truncated or not a checkpoint" in error_of(tmp_path, content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"w":{"$tensor":"v"}}', "is damaged: 'v'"),
        ('{"w":{"$tensor":["w"]}}', "is damaged"),
        ('{"w":{"$complex":"w"}}', "is damaged"),
        ('{"w":{"$tuple":3}}', "is damaged"),
        ('{"w":{"$items":[1]}}', "is damaged"),
        ('{"w":{"$items":[[[],1]]}}', "is damaged"),
        ("[]", "is not a checkpoint of this program"),
        ('{"w":', "is not JSON"),
        ('{"a":' * 500 + "1" + "}" * 500, "more than 64 deep"),
        ("[" * 500_000, "more than 64 deep"),
        ('{"a":' + "9" * 5000 + "}", "is not JSON"),
        ('{"a":' + "9" * 30 + "}", "an integer of more than 64 bits"),
    ],
)
def test_content_that_cannot_be_decoded_is_refused(tmp_path: Path, text: str, message: str) -> None:
    assert message in error_of(tmp_path, make_store(text, entry("F32", [1], 0, 4), bytes(4)))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"content": None}, "is not a checkpoint of this program"),
        ({"format": None}, "is not a checkpoint of this program"),
        ({"format": "5"}, "has format 5; this program reads format 4"),
        ({"format": "5\n\x1b[31m" * 100}, "this program reads format 4"),
        ({"kind": "other"}, "its summary cannot be read"),
        ({"kind": None}, "its summary cannot be read"),
        ({"epoch": "-1"}, "its summary cannot be read"),
        ({"epoch": "9" * 5000}, "its summary cannot be read"),
        ({"number": "1.5"}, "its summary cannot be read"),
        ({"number": 1}, "is truncated or not a checkpoint"),
    ],
)
def test_wrong_metadata_is_refused(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    found = error_of(tmp_path, make_store("{}", **metadata))
    assert message in found
    assert found.isprintable()
    assert len(found) < 400


def test_bool_tensor_with_other_bytes_is_refused(tmp_path: Path) -> None:
    content = make_store(CONTENT_OF_W, entry("BOOL", [2], 0, 2), b"\x01\x02")
    assert "w contains values other than 0 and 1" in error_of(tmp_path, content)


def test_error_message_about_hostile_name_is_short_and_printable(tmp_path: Path) -> None:
    for name in ("x" * 10_000, "\x1b[31mred\n"):
        tensors = entry("F32", [1], 4, 8, json.dumps(name)[1:-1])
        message = error_of(tmp_path, make_store("{}", tensors, bytes(8)))
        assert len(message) < 400
        assert message.isprintable()


LOAD_WITH_LIMITED_MEMORY = """
import resource, sys
from pathlib import Path
from app.runtime.errors import UserError
from app.training.checkpoint.store import read_store

resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
for file in sys.argv[1:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read_store(Path(file))
    except UserError as error:
        result = str(error)
    else:
        result = "loaded"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(grown // 1024, result)
"""
MEMORY_BOMBS = {
    "more than 4,194,304 values": make_store("[" + "[]," * 5_000_000 + "1]"),
    "more than 64 deep": make_store("[" * 2_000_000),
    "is truncated": make_safetensors("[" * 4_000_000),
    "or not a checkpoint": make_store("{}", entry("U8", [10**12], 0, 10**12)),
}


def test_memory_bombs_are_refused_before_allocation(tmp_path: Path) -> None:
    files = [tmp_path / f"{index}.safetensors" for index in range(len(MEMORY_BOMBS))]
    for file, content in zip(files, MEMORY_BOMBS.values(), strict=True):
        file.write_bytes(content)
    command = [sys.executable, "-c", LOAD_WITH_LIMITED_MEMORY, *map(str, files)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, cwd=Path(SUPPORT_DIR).parents[1]
    )
    assert done.returncode == 0, done.stderr
    for name, line in zip(MEMORY_BOMBS, done.stdout.splitlines(), strict=True):
        megabytes, _, message = line.partition(" ")
        assert name in message
        assert int(megabytes) < 100, name


# ---- files without code that are not checkpoints

CONTENT: dict[str, Any] = {
    "config": {"seed": 0},
    "model": {"weight": torch.zeros(2)},
    "task": {},
    "epoch": 1,
    "history": [{"epoch": 1, "stage": "train", "loss_mean": float("nan")}],
    "training": {
        "optimizers": {},
        "averaging": {},
        "batches": 0,
        "batches_in_epoch": 0,
        "phase": "train",
        "end": None,
        "mid_epoch": {"batches": 1, "rows": {}, "ranks": []},
        "callbacks": {},
        "nonfinite": {},
    },
    "number": 1,
}


def test_find_problem_accepts_checkpoint() -> None:
    assert find_problem(CONTENT) is None
    assert find_problem(CONTENT | {"training": None, "config": None}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": "1"}, "epoch is of type str, not int"),
        ({"epoch": True}, "epoch is of type bool, not int"),
        ({"epoch": -1}, "epoch=-1 is below 0"),
        ({"model": [1]}, "model is of type list, not dict"),
        ({"model": {"weight": [1]}}, "model contains more than named tensors"),
        ({"task": None}, "task is of type NoneType, not dict"),
        ({"config": []}, "config is of type list, not dict or NoneType"),
        ({"history": {}}, "history is of type dict, not list"),
        ({"history": [1]}, "history is not a list of rows"),
        ({"history": [{"epoch": 1, "stage": ["train"]}]}, "history is not a list of rows"),
        ({"training": {"phase": "train"}}, "it has no training.optimizers"),
        ({"training": CONTENT["training"] | {"mid_epoch": {}}}, "no training.mid_epoch.batches"),
    ],
)
def test_checkpoint_with_wrong_type_names_entry(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "a.safetensors").write_bytes(checkpoint_bytes(CONTENT | change))
    with pytest.raises(UserError, match="is not a checkpoint of this program") as caught:
        load_checkpoint(tmp_path / "a.safetensors")
    assert message in str(caught.value)
