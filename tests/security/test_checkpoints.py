"""Untrusted checkpoints load exactly as saved or fail with a clear error, and run no code."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.runtime.errors import UserError
from app.training.checkpoint.archive_reader import load_plain
from app.training.checkpoint.content_check import check_content
from tests.support.hostile_files import (
    CODE_PICKLES,
    MEMORY_BOMBS,
    SAMPLE_VALUE,
    doubling_lists,
    global_opcode,
    is_identical,
    long_opcode,
    make_archive,
    make_pickle,
    tensor_pickle,
    torch_save_bytes,
    unicode_opcode,
)
from tests.support.processes import SUPPORT_DIR

GOOD = torch_save_bytes(SAMPLE_VALUE)
FUZZ = settings(
    max_examples=100,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
MUCH_FUZZ = settings(FUZZ, max_examples=5000)


def load_or_none(folder: Path, content: bytes) -> Any:
    """Load a file; return None if it is refused, by a `UserError` of one line."""
    file = folder / "a.pt"
    file.write_bytes(content)
    try:
        return load_plain(file)
    except UserError as error:
        assert str(error).startswith(f"{file} ")
        assert "\n" not in str(error)
        assert len(str(error)) < 400
        return None


def error_of(folder: Path, content: bytes) -> str:
    """Return the error message for a file that must be refused."""
    (folder / "a.pt").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_plain(folder / "a.pt")
    return str(caught.value)


# ---- valid files


@pytest.mark.parametrize("name", ["float64", "float16", "int8", "int16", "int32", "complex64"])
@pytest.mark.parametrize("other", ["uint16", "uint64", "float8_e4m3fn"])
def test_load_plain_keeps_dtypes_and_bits(tmp_path: Path, name: str, other: str) -> None:
    value = {kind: torch.arange(4).to(getattr(torch, kind)) for kind in (name, other)}
    found = load_or_none(tmp_path, torch_save_bytes(value))
    assert found.keys() == value.keys()
    for kind, tensor in found.items():
        assert tensor.dtype == getattr(torch, kind)
        assert tensor.view(torch.uint8).tolist() == value[kind].view(torch.uint8).tolist()


def test_load_plain_returns_identical_value(tmp_path: Path) -> None:
    assert is_identical(load_or_none(tmp_path, GOOD), SAMPLE_VALUE)


def test_load_plain_keeps_shared_storages(tmp_path: Path) -> None:
    tied = torch.zeros(3)
    found = load_or_none(tmp_path, torch_save_bytes({"a": tied, "b": tied[1:]}))
    found["a"][1] = 5
    assert found["b"].tolist() == [5, 0]


def test_load_plain_ignores_zip_comment(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(GOOD)
    with zipfile.ZipFile(tmp_path / "a.pt", "a") as file:
        file.comment = b"sha256:" + b"0" * 64
    assert is_identical(load_plain(tmp_path / "a.pt"), SAMPLE_VALUE)


# ---- damaged files


def check_truncated(folder: Path, length: int) -> None:
    assert load_or_none(folder, GOOD[:length]) is None


def check_flipped(folder: Path, index: int, bits: int) -> None:
    content = bytearray(GOOD)
    content[index] ^= bits
    found = load_or_none(folder, bytes(content))
    assert found is None or is_identical(found, SAMPLE_VALUE)


def check_moved(folder: Path, first: int, second: int, length: int) -> None:
    """Overwrite a piece of the file with another one, or remove it."""
    piece = GOOD[first : first + length]
    for content in (
        GOOD[:second] + piece + GOOD[second + length :],
        GOOD[:first] + GOOD[first + length :],
    ):
        found = load_or_none(folder, content)
        assert found is None or is_identical(found, SAMPLE_VALUE)


def check_shuffled(folder: Path, order: list[int]) -> None:
    """Store entries under other names, each with the right checksum, or drop them."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(GOOD)) as good, zipfile.ZipFile(file, "w") as zip_file:
        names = good.namelist()
        for name, index in zip(names, order, strict=False):
            zip_file.writestr(name, good.read(names[index % len(names)]))
    found = load_or_none(folder, file.getvalue())
    assert found is None or found.keys() == SAMPLE_VALUE.keys()


INDEX = st.integers(0, len(GOOD) - 1)
BITS = st.integers(1, 255)
LENGTHS = st.integers(1, 200)
ORDERS = st.lists(st.integers(0, 20), max_size=20)


@FUZZ
@given(length=INDEX)
def test_truncated_file_is_refused(tmp_path: Path, length: int) -> None:
    check_truncated(tmp_path, length)


@FUZZ
@given(index=INDEX, bits=BITS)
def test_flipped_bits_are_refused_or_harmless(tmp_path: Path, index: int, bits: int) -> None:
    check_flipped(tmp_path, index, bits)


@FUZZ
@given(first=INDEX, second=INDEX, length=LENGTHS)
def test_moved_or_missing_pieces_are_refused_or_harmless(
    tmp_path: Path, first: int, second: int, length: int
) -> None:
    check_moved(tmp_path, first, second, length)


@FUZZ
@given(order=ORDERS)
def test_shuffled_or_missing_entries_are_refused_or_keep_keys(
    tmp_path: Path, order: list[int]
) -> None:
    check_shuffled(tmp_path, order)


@pytest.mark.long
def test_file_truncated_at_every_length_is_refused(tmp_path: Path) -> None:
    for length in range(len(GOOD)):
        check_truncated(tmp_path, length)


@pytest.mark.long
def test_every_byte_flipped_is_refused_or_harmless(tmp_path: Path) -> None:
    for index in range(len(GOOD)):
        check_flipped(tmp_path, index, 1 << index % 8)
        check_flipped(tmp_path, index, 255)


@pytest.mark.long
@MUCH_FUZZ
@given(first=INDEX, second=INDEX, length=LENGTHS, order=ORDERS)
def test_many_moved_pieces_are_refused_or_harmless(
    tmp_path: Path, first: int, second: int, length: int, order: list[int]
) -> None:
    check_moved(tmp_path, first, second, length)
    check_shuffled(tmp_path, order)


# ---- random pickles

NAMES = [
    "os.system",
    "builtins.exec",
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch.FloatStorage",
    "torch.BoolStorage",
    "torch.uint16",
]
TEXTS = ["storage", "0", "1", "cpu", "a", "open('was_here','w')", "touch was_here"]
PIECES = st.one_of(
    st.sampled_from(
        [bytes([code]) for code in b"(0123456789NQRabdeghijlopqrstu)]}\x81\x85\x86\x87"]
    ),
    st.sampled_from([b"\x88", b"\x89", b"\x8f", b"\x90", b"\x93", b"\x94", b"\x97"]),
    st.sampled_from(NAMES).map(global_opcode),
    st.sampled_from(TEXTS).map(unicode_opcode),
    st.integers(-(2**70), 2**70).map(long_opcode),
    st.integers(-3, 20).map(long_opcode),
    st.integers(0, 9).flatmap(lambda n: st.sampled_from([b"q" + bytes([n]), b"h" + bytes([n])])),
    st.just(tensor_pickle(16, (4,), (1,))[2:-1]),
    st.binary(max_size=3),
)


def check_pickle(folder: Path, pieces: list[bytes]) -> None:
    content = make_archive(make_pickle(b"".join(pieces)), **{"0": bytes(64), "1": b"\x05" * 8})
    value = load_or_none(folder, content)
    assert len(repr(value)) < 1e6
    assert not Path("was_here").exists()


@settings(FUZZ, max_examples=200)
@given(pieces=st.lists(PIECES, max_size=25))
def test_random_pickles_run_nothing(tmp_cwd: Path, pieces: list[bytes]) -> None:
    check_pickle(tmp_cwd, pieces)


@pytest.mark.long
@settings(MUCH_FUZZ, max_examples=30_000)
@given(pieces=st.lists(PIECES, max_size=60))
def test_many_random_pickles_run_nothing(tmp_cwd: Path, pieces: list[bytes]) -> None:
    check_pickle(tmp_cwd, pieces)


# ---- attacks


@pytest.mark.parametrize("name", CODE_PICKLES)
def test_code_is_refused_by_name_and_not_run(tmp_cwd: Path, name: str) -> None:
    message = error_of(tmp_cwd, make_archive(make_pickle(CODE_PICKLES[name])))
    assert f"contains more than tensors and plain values; refused: {name}" in message
    assert not Path("was_here").exists()


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (global_opcode("torch.FloatStorage") + b")R", "a call of torch.FloatStorage with unknown"),
        (
            global_opcode("collections.OrderedDict") + b"]" + b"\x85R",
            "a call of collections.OrderedDict",
        ),
        (b"])R", "a call of a value"),
        (b"]" + global_opcode("torch.uint16") + b"a", "torch.uint16"),
        (unicode_opcode("storage") + b"Q", "a persistent id that is not a storage"),
    ],
)
def test_calls_and_names_outside_tensors_are_refused(
    tmp_path: Path, pickled: bytes, message: str
) -> None:
    assert f"refused: {message}" in error_of(tmp_path, make_archive(make_pickle(pickled)))


def test_number_of_opcodes_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.training.checkpoint.pickle_reader.MAX_OPCODES", 100)
    assert load_or_none(tmp_path, make_archive(make_pickle(b"]" + b"Na" * 48))) == [None] * 48
    assert "more than 100 opcodes" in error_of(
        tmp_path, make_archive(make_pickle(b"]" + b"Na" * 50))
    )


class CodePickle:
    """An object whose pickle opens a file for writing when it is loaded."""

    def __reduce__(self) -> Any:
        return (open, ("was_here", "w"))


@pytest.mark.parametrize("protocol", range(6))
def test_code_is_refused_in_every_protocol(tmp_cwd: Path, protocol: int) -> None:
    pickled = pickle.dumps({"model": [CodePickle()]}, protocol)
    assert "contains more than tensors" in error_of(tmp_cwd, make_archive(pickled))
    assert not Path("was_here").exists()


LOAD_WITH_LIMITED_MEMORY = """
import resource, sys
from pathlib import Path
from app.runtime.errors import UserError
from app.training.checkpoint.archive_reader import load_plain

resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
for file in sys.argv[1:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        load_plain(Path(file))
    except UserError as error:
        result = str(error)
    else:
        result = "loaded"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(grown // 1024, result)
"""


def test_memory_bombs_are_refused_before_allocation(tmp_path: Path) -> None:
    files = [tmp_path / f"{index}.pt" for index in range(len(MEMORY_BOMBS))]
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
        assert int(megabytes) < 50, name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tensor_pickle(17, (4,), (1,)), "claims 17 elements and has 64 bytes"),
        (tensor_pickle(16, (4,), (6,)), "its storage has 16 elements"),
        (tensor_pickle(16, (4,), (1,), 13), "its storage has 16 elements"),
        (tensor_pickle(16, (17,), (0,)), "its storage has 16 elements"),
        (tensor_pickle(16, (4,), (-1,)), "impossible size, stride or offset"),
        (tensor_pickle(16, (4, 1), (1,)), "2 sizes and 1 strides"),
        (tensor_pickle(16, (1,) * 100, (1,) * 100), "100 sizes"),
        (tensor_pickle(16, (), (), 17), "its storage has 16 elements"),
        (
            tensor_pickle(2, (2,), (1,)).replace(b"Float", b"Bool"),
            "contains values other than 0 and 1",
        ),
        (
            tensor_pickle(2, (2,), (1,)).replace(unicode_opcode("0"), unicode_opcode("../1")),
            "no item named",
        ),
    ],
)
def test_tensors_beyond_their_storage_are_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    assert message in error_of(tmp_path, make_archive(content, **{"0": b"\x05" * 64}))


def test_error_message_is_short_and_printable(tmp_path: Path) -> None:
    for pickled in (
        make_pickle(doubling_lists(60) + doubling_lists(60) + b"\x93"),
        tensor_pickle(16, (4,), (1,)).replace(long_opcode(4), doubling_lists(60)),
        make_pickle(global_opcode("os." + "x" * 10_000)),
        make_pickle(global_opcode("os.x\x1b[31m")),
    ):
        message = error_of(tmp_path, make_archive(pickled, **{"0": bytes(64)}))
        assert len(message) < 400
        assert message.isprintable()


def archive_with_entry(name: str, **fields: int) -> bytes:
    """Return an archive with an additional entry, and set fields of its `ZipInfo`."""
    file = io.BytesIO(make_archive(make_pickle(b"N")))
    info = zipfile.ZipInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    with zipfile.ZipFile(file, "a") as zip_file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about duplicate names
        zip_file.writestr(info, b"content")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (archive_with_entry("a/data.pkl"), "two entries have the same name"),
        (archive_with_entry("/etc/passwd"), "/etc/passwd points outside the archive"),
        (archive_with_entry("a/../../b"), "a/../../b points outside the archive"),
        (archive_with_entry("C:\\b"), "points outside the archive"),
        (archive_with_entry("a/link", external_attr=0o120777 << 16), "a/link is a link"),
        (archive_with_entry("a/b", compress_type=zipfile.ZIP_LZMA), "a/b is compressed"),
        (
            archive_with_entry("a/b").replace(
                b"\x14\x03\x14\x00\x00\x00", b"\x14\x03\x14\x00\x01\x00"
            ),
            "a/data.pkl is encrypted",
        ),
        (make_archive(b"", **{"0": b""}).replace(b"data.pkl", b"date.pkl"), "it has no data.pkl"),
    ],
)
def test_unusual_archive_entries_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    assert message in error_of(tmp_path, content)


def test_overlapping_entries_are_refused(tmp_path: Path) -> None:
    """Each entry of the central directory would read the same bytes."""
    content = bytearray(make_archive(make_pickle(b"N"), **{"0": bytes(10_000), "1": b""}))
    with zipfile.ZipFile(io.BytesIO(bytes(content))) as file:
        first, second = file.infolist()[1:]
    start = content.rindex(b"PK\x01\x02", 0, content.rindex(b"a/data/1"))
    content[start + 16 : start + 28] = content[start + 16 : start + 16] + (
        first.CRC.to_bytes(4, "little") + first.file_size.to_bytes(4, "little") * 2
    )
    content[start + 42 : start + 46] = first.header_offset.to_bytes(4, "little")
    assert second.file_size == 0
    assert "its entries are larger than the file" in error_of(tmp_path, bytes(content))


def test_other_byte_order_is_refused(tmp_path: Path) -> None:
    other = {"little": b"big", "big": b"little"}[sys.byteorder]
    file = io.BytesIO(make_archive(make_pickle(b"N")))
    with zipfile.ZipFile(file, "a") as zip_file:
        zip_file.writestr("a/byteorder", other)
    assert "a machine with another byte order" in error_of(tmp_path, file.getvalue())


@pytest.mark.parametrize("name", ["", ".metadata", "__0_0.distcp"])
def test_load_plain_refuses_torch_distributed_checkpoint(tmp_cwd: Path, name: str) -> None:
    (tmp_cwd / ".metadata").write_bytes(pickle.dumps(CodePickle()))
    (tmp_cwd / "__0_0.distcp").write_bytes(GOOD)
    with pytest.raises(UserError, match=r"is a torch\.distributed\.checkpoint"):
        load_plain(tmp_cwd / name)
    assert not Path("was_here").exists()


# ---- files without code that are not checkpoints

CONTENT: dict[str, Any] = {
    "format": 3,
    "config": json.dumps({"seed": 0}),
    "template": "seed: 0",
    "model": {"weight": torch.zeros(2)},
    "task": {},
    "epoch": 1,
    "history": json.dumps([{"epoch": 1, "stage": "train", "loss_mean": float("nan")}]),
    "training": {
        "learning": {},
        "averaging": {},
        "batches": 0,
        "trained": 0,
        "is_over": True,
        "time_is_up": False,
        "under_way": {"batches": 1, "rows": {}, "ranks": []},
        "watchers": {},
        "saves": 1,
        "nonfinite": {},
    },
}


def test_check_content_accepts_checkpoint() -> None:
    check_content(Path("a.pt"), CONTENT)
    check_content(Path("a.pt"), CONTENT | {"training": None, "config": "null", "template": None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": "1"}, "epoch is of type str, not int"),
        ({"epoch": True}, "epoch is of type bool, not int"),
        ({"epoch": -1}, "epoch=-1 is below 0"),
        ({"model": [1]}, "model is of type list, not dict"),
        ({"model": {"weight": [1]}}, "model contains more than named tensors"),
        ({"task": None}, "task is of type NoneType, not dict"),
        ({"config": "[]"}, "config is not a configuration"),
        ({"template": None}, "config has no template"),
        ({"history": "{}"}, "history is not a list of rows"),
        ({"history": "[1]"}, "history is not a list of rows"),
        ({"history": '[{"epoch": 1, "stage": ["train"]}]'}, "history is not a list of rows"),
        ({"training": {"is_over": True}}, "it has no training.learning"),
        ({"training": CONTENT["training"] | {"under_way": {}}}, "no training.under_way.batches"),
    ],
)
def test_check_content_with_wrong_type_names_entry(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match="is not a checkpoint of this program") as caught:
        check_content(Path("a.pt"), CONTENT | change)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["config", "history"])
@pytest.mark.parametrize("json_text", ["[" * 500_000, "[" * 500 + "]" * 500, "{", "1" * 9999])
def test_check_content_with_excessive_json_fails(name: str, json_text: str) -> None:
    with pytest.raises(UserError, match=rf"a\.pt: {name}"):
        check_content(Path("a.pt"), CONTENT | {name: json_text})
