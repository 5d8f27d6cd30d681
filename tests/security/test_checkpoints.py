"""Checkpoints from anywhere: the very value that was saved, or one clear error; nothing runs."""

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
    MEMORY_BOMBS,
    CODE_PICKLES,
    SAMPLE_VALUE,
    make_archive,
    tensor_pickle,
    doubling_lists,
    global_opcode,
    long_opcode,
    is_identical,
    torch_save_bytes,
    unicode_opcode,
    make_pickle,
)
from tests.support.processes import TESTS

GOOD = torch_save_bytes(SAMPLE_VALUE)
FUZZ = settings(
    max_examples=100,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
MUCH_FUZZ = settings(FUZZ, max_examples=5000)


def loaded(folder: Path, content: bytes) -> Any:
    """The value of a file; None where a `UserError` of one line refuses it."""
    file = folder / "a.pt"
    file.write_bytes(content)
    try:
        return load_plain(file)
    except UserError as error:
        assert str(error).startswith(f"{file} ")
        assert "\n" not in str(error)
        assert len(str(error)) < 400
        return None


def refused(folder: Path, content: bytes) -> str:
    """Why a file is refused."""
    (folder / "a.pt").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_plain(folder / "a.pt")
    return str(caught.value)


# ---- what is whole


@pytest.mark.parametrize("name", ["float64", "float16", "int8", "int16", "int32", "complex64"])
@pytest.mark.parametrize("other", ["uint16", "uint64", "float8_e4m3fn"])
def test_all_kinds_of_numbers(tmp_path: Path, name: str, other: str) -> None:
    value = {kind: torch.arange(4).to(getattr(torch, kind)) for kind in (name, other)}
    found = loaded(tmp_path, torch_save_bytes(value))
    assert found.keys() == value.keys()
    for kind, tensor in found.items():
        assert tensor.dtype == getattr(torch, kind)
        assert tensor.view(torch.uint8).tolist() == value[kind].view(torch.uint8).tolist()


def test_a_value_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    assert is_identical(loaded(tmp_path, GOOD), SAMPLE_VALUE)


def test_tensors_that_share_their_values_share_them_again(tmp_path: Path) -> None:
    tied = torch.zeros(3)
    found = loaded(tmp_path, torch_save_bytes({"a": tied, "b": tied[1:]}))
    found["a"][1] = 5
    assert found["b"].tolist() == [5, 0]


def test_a_seal_behind_the_archive_is_no_damage(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(GOOD)
    with zipfile.ZipFile(tmp_path / "a.pt", "a") as file:
        file.comment = b"sha256:" + b"0" * 64
    assert is_identical(load_plain(tmp_path / "a.pt"), SAMPLE_VALUE)


# ---- what is damaged


def check_cut(folder: Path, length: int) -> None:
    assert loaded(folder, GOOD[:length]) is None


def check_flipped(folder: Path, place: int, bits: int) -> None:
    content = bytearray(GOOD)
    content[place] ^= bits
    found = loaded(folder, bytes(content))
    assert found is None or is_identical(found, SAMPLE_VALUE)


def check_moved(folder: Path, first: int, second: int, length: int) -> None:
    """A piece of the file where another should be, or missing."""
    piece = GOOD[first : first + length]
    for content in (
        GOOD[:second] + piece + GOOD[second + length :],
        GOOD[:first] + GOOD[first + length :],
    ):
        found = loaded(folder, content)
        assert found is None or is_identical(found, SAMPLE_VALUE)


def check_shuffled(folder: Path, order: list[int]) -> None:
    """Entries under the names of others, each with its right checksum."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(GOOD)) as good, zipfile.ZipFile(file, "w") as written:
        names = good.namelist()
        for name, index in zip(names, order, strict=False):
            written.writestr(name, good.read(names[index % len(names)]))
    found = loaded(folder, file.getvalue())
    assert found is None or found.keys() == SAMPLE_VALUE.keys()


INDEX = st.integers(0, len(GOOD) - 1)
BITS = st.integers(1, 255)
LENGTHS = st.integers(1, 200)
ORDERS = st.lists(st.integers(0, 20), max_size=20)


@FUZZ
@given(length=INDEX)
def test_cut_anywhere(tmp_path: Path, length: int) -> None:
    check_cut(tmp_path, length)


@FUZZ
@given(place=INDEX, bits=BITS)
def test_any_byte_flipped(tmp_path: Path, place: int, bits: int) -> None:
    check_flipped(tmp_path, place, bits)


@FUZZ
@given(first=INDEX, second=INDEX, length=LENGTHS)
def test_pieces_moved_or_missing(tmp_path: Path, first: int, second: int, length: int) -> None:
    check_moved(tmp_path, first, second, length)


@FUZZ
@given(order=ORDERS)
def test_entries_under_other_names_or_missing(tmp_path: Path, order: list[int]) -> None:
    check_shuffled(tmp_path, order)


@pytest.mark.long
def test_cut_at_every_length(tmp_path: Path) -> None:
    for length in range(len(GOOD)):
        check_cut(tmp_path, length)


@pytest.mark.long
def test_every_byte_flipped(tmp_path: Path) -> None:
    for place in range(len(GOOD)):
        check_flipped(tmp_path, place, 1 << place % 8)
        check_flipped(tmp_path, place, 255)


@pytest.mark.long
@MUCH_FUZZ
@given(first=INDEX, second=INDEX, length=LENGTHS, order=ORDERS)
def test_much_moved(tmp_path: Path, first: int, second: int, length: int, order: list[int]) -> None:
    check_moved(tmp_path, first, second, length)
    check_shuffled(tmp_path, order)


# ---- pickles of anything

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
    value = loaded(folder, content)
    assert len(repr(value)) < 1e6
    assert not Path("was_here").exists()


@settings(FUZZ, max_examples=200)
@given(pieces=st.lists(PIECES, max_size=25))
def test_random_pickles(elsewhere: Path, pieces: list[bytes]) -> None:
    check_pickle(elsewhere, pieces)


@pytest.mark.long
@settings(MUCH_FUZZ, max_examples=30_000)
@given(pieces=st.lists(PIECES, max_size=60))
def test_many_random_pickles(elsewhere: Path, pieces: list[bytes]) -> None:
    check_pickle(elsewhere, pieces)


# ---- attacks


@pytest.mark.parametrize("name", CODE_PICKLES)
def test_code_is_refused_by_name_and_not_run(elsewhere: Path, name: str) -> None:
    said = refused(elsewhere, make_archive(make_pickle(CODE_PICKLES[name])))
    assert f"holds more than tensors and plain values; refused: {name}" in said
    assert not Path("was_here").exists()


@pytest.mark.parametrize(
    ("pickled", "said"),
    [
        (global_opcode("torch.FloatStorage") + b")R", "a call of torch.FloatStorage with unknown"),
        (global_opcode("collections.OrderedDict") + b"]" + b"\x85R", "a call of collections.OrderedDict"),
        (b"])R", "a call of a value"),
        (b"]" + global_opcode("torch.uint16") + b"a", "torch.uint16"),
        (unicode_opcode("storage") + b"Q", "a persistent id that is no storage"),
    ],
)
def test_calls_and_names_elsewhere_than_in_tensors(
    tmp_path: Path, pickled: bytes, said: str
) -> None:
    assert f"refused: {said}" in refused(tmp_path, make_archive(make_pickle(pickled)))


def test_pickles_are_not_endless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.training.checkpoint.pickle_reader.MAX_OPCODES", 100)
    assert loaded(tmp_path, make_archive(make_pickle(b"]" + b"Na" * 48))) == [None] * 48
    assert "more than 100 opcodes" in refused(tmp_path, make_archive(make_pickle(b"]" + b"Na" * 50)))


class Sly:
    """What pickle would run."""

    def __reduce__(self) -> Any:
        return (open, ("was_here", "w"))


@pytest.mark.parametrize("protocol", range(6))
def test_code_is_refused_in_every_protocol(elsewhere: Path, protocol: int) -> None:
    pickled = pickle.dumps({"model": [Sly()]}, protocol)
    assert "holds more than tensors" in refused(elsewhere, make_archive(pickled))
    assert not Path("was_here").exists()


LIMITED = """
import resource, sys
from pathlib import Path
from app.config.errors import UserError
from app.plain_archive import load_plain

resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
for file in sys.argv[1:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        load_plain(Path(file))
    except UserError as error:
        said = str(error)
    else:
        said = "loaded"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(grown // 1024, said)
"""


def test_bombs_are_refused_before_they_take_memory(tmp_path: Path) -> None:
    files = [tmp_path / f"{index}.pt" for index in range(len(MEMORY_BOMBS))]
    for file, content in zip(files, MEMORY_BOMBS.values(), strict=True):
        file.write_bytes(content)
    command = [sys.executable, "-c", LIMITED, *map(str, files)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, cwd=Path(TESTS).parent
    )
    assert done.returncode == 0, done.stderr
    for name, line in zip(MEMORY_BOMBS, done.stdout.splitlines(), strict=True):
        megabytes, _, said = line.partition(" ")
        assert name in said
        assert int(megabytes) < 50, name


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (tensor_pickle(17, (4,), (1,)), "claims 17 elements and has 64 bytes"),
        (tensor_pickle(16, (4,), (6,)), "its storage has 16 elements"),
        (tensor_pickle(16, (4,), (1,), 13), "its storage has 16 elements"),
        (tensor_pickle(16, (17,), (0,)), "its storage has 16 elements"),
        (tensor_pickle(16, (4,), (-1,)), "no tensor has"),
        (tensor_pickle(16, (4, 1), (1,)), "2 sizes and 1 strides"),
        (tensor_pickle(16, (1,) * 100, (1,) * 100), "100 sizes"),
        (tensor_pickle(16, (), (), 17), "its storage has 16 elements"),
        (tensor_pickle(2, (2,), (1,)).replace(b"Float", b"Bool"), "holds more than false and true"),
        (tensor_pickle(2, (2,), (1,)).replace(unicode_opcode("0"), unicode_opcode("../1")), "no item named"),
    ],
)
def test_tensors_lie_in_their_storages(tmp_path: Path, content: bytes, said: str) -> None:
    assert said in refused(tmp_path, make_archive(content, **{"0": b"\x05" * 64}))


def test_what_an_error_names_is_not_spelled_out(tmp_path: Path) -> None:
    for pickled in (
        make_pickle(doubling_lists(60) + doubling_lists(60) + b"\x93"),
        tensor_pickle(16, (4,), (1,)).replace(long_opcode(4), doubling_lists(60)),
        make_pickle(global_opcode("os." + "x" * 10_000)),
        make_pickle(global_opcode("os.x\x1b[31m")),
    ):
        said = refused(tmp_path, make_archive(pickled, **{"0": bytes(64)}))
        assert len(said) < 400
        assert said.isprintable()


def entry(name: str, **more: int) -> bytes:
    """An archive with one entry more, unlike those of a checkpoint."""
    file = io.BytesIO(make_archive(make_pickle(b"N")))
    info = zipfile.ZipInfo(name)
    for field, value in more.items():
        setattr(info, field, value)
    with zipfile.ZipFile(file, "a") as written, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there already
        written.writestr(info, b"content")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (entry("a/data.pkl"), "two entries have the same name"),
        (entry("/etc/passwd"), "/etc/passwd lies outside the archive"),
        (entry("a/../../b"), "a/../../b lies outside the archive"),
        (entry("C:\\b"), "lies outside the archive"),
        (entry("a/link", external_attr=0o120777 << 16), "a/link is a link"),
        (entry("a/b", compress_type=zipfile.ZIP_LZMA), "a/b is compressed"),
        (
            entry("a/b").replace(b"\x14\x03\x14\x00\x00\x00", b"\x14\x03\x14\x00\x01\x00"),
            "a/data.pkl is encrypted",
        ),
        (make_archive(b"", **{"0": b""}).replace(b"data.pkl", b"date.pkl"), "it has no data.pkl"),
    ],
)
def test_archives_unlike_those_of_checkpoints(tmp_path: Path, content: bytes, said: str) -> None:
    assert said in refused(tmp_path, content)


def test_entries_over_one_another_are_refused(tmp_path: Path) -> None:
    """Each entry of the directory would read the same bytes."""
    content = bytearray(make_archive(make_pickle(b"N"), **{"0": bytes(10_000), "1": b""}))
    with zipfile.ZipFile(io.BytesIO(bytes(content))) as file:
        first, second = file.infolist()[1:]
    at = content.rindex(b"PK\x01\x02", 0, content.rindex(b"a/data/1"))
    content[at + 16 : at + 28] = content[at + 16 : at + 16] + (
        first.CRC.to_bytes(4, "little") + first.file_size.to_bytes(4, "little") * 2
    )
    content[at + 42 : at + 46] = first.header_offset.to_bytes(4, "little")
    assert second.file_size == 0
    assert "its entries are larger than the file" in refused(tmp_path, bytes(content))


def test_bytes_of_the_other_order(tmp_path: Path) -> None:
    other = {"little": b"big", "big": b"little"}[sys.byteorder]
    file = io.BytesIO(make_archive(make_pickle(b"N")))
    with zipfile.ZipFile(file, "a") as written:
        written.writestr("a/byteorder", other)
    assert "bytes are ordered otherwise" in refused(tmp_path, file.getvalue())


@pytest.mark.parametrize("name", ["", ".metadata", "__0_0.distcp"])
def test_a_folder_of_torch_distributed_checkpoint(elsewhere: Path, name: str) -> None:
    (elsewhere / ".metadata").write_bytes(pickle.dumps(Sly()))
    (elsewhere / "__0_0.distcp").write_bytes(GOOD)
    with pytest.raises(UserError, match=r"is of torch\.distributed\.checkpoint"):
        load_plain(elsewhere / name)
    assert not Path("was_here").exists()


# ---- what is plain, and yet no checkpoint

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


def test_a_checkpoint_is_one() -> None:
    check_content(Path("a.pt"), CONTENT)
    check_content(Path("a.pt"), CONTENT | {"training": None, "config": "null", "template": None})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epoch": "1"}, "epoch is of type str, not int"),
        ({"epoch": True}, "epoch is of type bool, not int"),
        ({"epoch": -1}, "epoch=-1 is below 0"),
        ({"model": [1]}, "model is of type list, not dict"),
        ({"model": {"weight": [1]}}, "model has more than named tensors"),
        ({"task": None}, "task is of type NoneType, not dict"),
        ({"config": "[]"}, "config is no configuration"),
        ({"template": None}, "config has no template"),
        ({"history": "{}"}, "history is no list of rows"),
        ({"history": "[1]"}, "history is no list of rows"),
        ({"history": '[{"epoch": 1, "stage": ["train"]}]'}, "history is no list of rows"),
        ({"training": {"is_over": True}}, "it has no training.learning"),
        ({"training": CONTENT["training"] | {"under_way": {}}}, "no training.under_way.batches"),
    ],
)
def test_content_of_wrong_types(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match="is no checkpoint of this program") as caught:
        check_content(Path("a.pt"), CONTENT | change)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["config", "history"])
@pytest.mark.parametrize("json_text", ["[" * 500_000, "[" * 500 + "]" * 500, "{", "1" * 9999])
def test_absurd_json(name: str, json_text: str) -> None:
    with pytest.raises(UserError, match=rf"a\.pt: {name}"):
        check_content(Path("a.pt"), CONTENT | {name: json_text})
