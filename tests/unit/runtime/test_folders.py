"""Folders that disappear while a run writes to them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from app.runtime.errors import StorageError, UserError
from app.runtime.files import write_text
from app.runtime.folders import held_folder, is_in_place, make_folder
from app.runtime.lock import file_lock


def test_held_folder_gets_subfolders_and_others_get_parents(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with held_folder(run), held_folder(tmp_path):
        write_text(run / "a" / "b" / "c.txt", "")
        write_text(tmp_path / "d" / "e.txt", "")
    write_text(tmp_path / "f" / "g" / "h.txt", "")
    assert (run / "a" / "b" / "c.txt").exists()


@pytest.mark.parametrize("fate", ["deleted", "moved", "replaced", "made again", "parent moved"])
def test_nothing_is_written_into_a_held_folder_that_is_gone(tmp_path: Path, fate: str) -> None:
    run = tmp_path / "home" / "run"
    run.mkdir(parents=True)

    def write_in_vain() -> None:
        for write in (
            lambda: write_text(run / "status.json", ""),
            lambda: write_text(run / "plots" / "new" / "loss.png", ""),
            lambda: make_folder(run / "tensorboard"),
            lambda: make_folder(run),
            lambda: file_lock(run / ".lock").__enter__(),
        ):
            with pytest.raises((StorageError, FileNotFoundError), match="moved or replaced"):
                write()

    with (
        pytest.raises(StorageError, match="run cannot be written: it was deleted"),
        held_folder(run),
    ):
        if fate == "parent moved":
            run.parent.rename(tmp_path / "moved")
        else:
            run.rename(tmp_path / "moved")
        if fate in ("deleted", "made again"):
            shutil.rmtree(tmp_path / "moved")
        if fate in ("replaced", "made again"):
            run.mkdir()
        assert not is_in_place(run)
        with pytest.raises(StorageError, match="moved or replaced"), held_folder(run):
            pass  # a nested call does not take the new folder for the old one
        write_in_vain()
        raise UserError("the best weights are missing")
    assert not [*run.glob("*")]
    assert run.exists() == (fate in ("replaced", "made again"))
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / "a.txt", "")  # nobody holds it any more


def test_held_folder_reached_through_a_link_is_held_by_both_names(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "run").mkdir()
    with held_folder(tmp_path / "link" / "run"):
        shutil.rmtree(tmp_path / "real" / "run")
        for name in ("link", "real"):
            with pytest.raises(StorageError):
                write_text(tmp_path / name / "run" / "a.txt", "")
    assert not (tmp_path / "real" / "run").exists()


def test_error_in_a_folder_that_is_in_place_stays_itself(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^a mistake$"), held_folder(tmp_path):
        raise UserError("a mistake")
    with pytest.raises(StorageError, match="No such file"), held_folder(tmp_path / "none"):
        pass
