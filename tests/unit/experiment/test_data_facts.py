"""Counts, names and shapes that come from the user's data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from app.config.overrides import parse_overrides
from app.config.resume import apply_overrides_to_saved
from app.config.saved import resolve_saved
from app.config.schema import DATA_FACTS, Job
from app.experiment.data_facts import with_data_facts
from tests.support.image_files import write_image_folder
from tests.support.runs import config_issues, job_for

CSV = ("data=csv", "data.path=x.csv", "model=mlp")


def write_csv(folder: Path, labels: list[object]) -> None:
    rows = [f"{index},{index * 2},{label}" for index, label in enumerate(labels)]
    (folder / "x.csv").write_text("\n".join(["a,b,label", *rows]))


def facts(job: Job) -> tuple[object, object, object]:
    return job.config.data.num_classes, job.config.data.class_names, job.config.data.input_shape


def test_table_of_numbers_gives_count_and_shape(tmp_cwd: Path) -> None:
    write_csv(tmp_cwd, [0, 1, 2] * 10)
    job = job_for(*CSV)
    assert facts(job) == (3, None, [2])
    assert job.plain["model"]["num_classes"] == 3
    assert job.plain["model"]["input_shape"] == [2]
    assert job.saved["model"]["num_classes"] == "${data.num_classes}"


def test_table_of_names_gives_classes_in_alphabetical_order(tmp_cwd: Path) -> None:
    write_csv(tmp_cwd, ["setosa", "virginica", "aster"] * 10)
    job = job_for(*CSV)
    assert facts(job) == (3, ["aster", "setosa", "virginica"], [2])
    assert job.plain["data"]["source"]["train"]["classes"] == ["aster", "setosa", "virginica"]


def test_table_of_values_has_no_classes(tmp_cwd: Path) -> None:
    write_csv(tmp_cwd, [0.5, 1.5, 2.5] * 10)
    assert facts(job_for("experiment=csv_regression", *CSV[1:])) == (None, None, [2])


def test_arrays_give_count_and_shape_after_resizing(tmp_cwd: Path) -> None:
    images = np.zeros((40, 8, 8), np.uint8)
    np.savez(tmp_cwd / "x.npz", x=images, y=np.arange(40) % 4)
    assert facts(job_for("data=npz", "data.path=x.npz")) == (4, None, [1, 8, 8])
    resized = job_for("data=npz", "data.path=x.npz", "data.resize=16")
    assert facts(resized) == (4, None, [1, 16, 16])
    assert resized.plain["model"]["in_channels"] == 1
    assert resized.plain["model"]["image_size"] == 16


def test_folders_give_count_and_names(tmp_cwd: Path) -> None:
    write_image_folder(tmp_cwd / "pets", {"dog": 5, "cat": 5})
    job = job_for("data=image_folder", "data.path=pets")
    assert facts(job) == (2, ["cat", "dog"], [3, 224, 224])
    assert job.data_warnings == []


@pytest.mark.parametrize(
    ("labels", "overrides", "message"),
    [
        ([1, 2, 3] * 5, (), "are 1, 2, 3; allowed are 0, 1, ... without a gap"),
        ([0] * 9, (), "the training data have 1 class; allowed: 2"),
        ([0, 1, 2] * 5, ("data.num_classes=2",), "data.num_classes=2, but data.source.train has"),
        (
            ["a", "b"] * 5,
            ("data.num_classes=3",),
            "data.num_classes=3, but data.source.train has 2",
        ),
        (
            ["a", "b"] * 5,
            ("data.class_names=[a,c]",),
            "unknown class 'b'; data.class_names allows: a, c",
        ),
    ],
)
def test_contradictions_are_errors_of_the_configuration(
    labels: list[object], overrides: tuple[str, ...], message: str, tmp_cwd: Path
) -> None:
    write_csv(tmp_cwd, labels)
    (issue,) = config_issues(*CSV, *overrides)
    assert message in issue


def test_paths_are_checked_with_everything_else(tmp_cwd: Path) -> None:
    issues = config_issues(*CSV, "optimizer.lr=-1")
    assert f"data.path={str(tmp_cwd / 'x.csv')!r} is not a file" in issues
    assert len(issues) == 2
    (issue,) = config_issues("data=image_folder", "data.path=pets")
    assert issue == f"data.path={str(tmp_cwd / 'pets')!r} is not a folder"
    (issue,) = config_issues("data=image_folder")
    assert issue == "data.path has no value; set it with data.path=... on the command line"


def test_damaged_and_copied_images_are_reported_before_a_run(tmp_cwd: Path) -> None:
    write_image_folder(tmp_cwd / "pets" / "train", {"dog": 5, "cat": 5})
    write_image_folder(tmp_cwd / "pets" / "test", {"dog": 1, "cat": 1}, seed=1)
    source, copy = tmp_cwd / "pets/train/dog/000.png", tmp_cwd / "pets/test/dog/000.png"
    copy.write_bytes(source.read_bytes())
    (warning,) = job_for("data=image_folder", "data.path=pets").data_warnings
    assert "1 images are also in another stage" in warning
    source.write_bytes(b"")
    (issue,) = config_issues("data=image_folder", "data.path=pets")
    assert "1 of 12 images cannot be read" in issue
    assert "train/dog/000.png: the file is empty" in issue


def test_saved_runs_keep_what_they_know_and_old_ones_have_no_names(tmp_cwd: Path) -> None:
    write_csv(tmp_cwd, ["a", "b"] * 10)
    saved = job_for(*CSV).saved
    now = with_data_facts(saved, dict.fromkeys(DATA_FACTS, "auto"))
    changed, changes = apply_overrides_to_saved(saved, now, parse_overrides(["data=csv"]))
    assert (changed["data"]["num_classes"], changed["data"]["class_names"]) == (2, ["a", "b"])
    assert changes == []
    old = job_for("model=mlp").saved
    del old["data"]["class_names"]
    changed, _ = apply_overrides_to_saved(old, now, [])
    assert changed["data"]["class_names"] is None


def test_class_names_must_be_as_many_as_classes() -> None:
    (issue,) = config_issues("data.class_names=[a,b]")
    assert issue == "data.num_classes=10, but data.class_names has 2 names: a, b"


def test_facts_do_not_change_the_configuration_they_are_added_to() -> None:
    saved = {"data": {"num_classes": "auto"}}
    assert with_data_facts(saved, {"num_classes": 3}) == {"data": {"num_classes": 3}}
    assert saved == {"data": {"num_classes": "auto"}}


def test_with_data_facts_keeps_names_that_look_like_interpolations() -> None:
    names = ["${ oc.env:HOME}", "${data.path}", "a"]
    saved = with_data_facts({"data": {"path": "x"}}, {"class_names": names})
    assert resolve_saved(saved)["data"]["class_names"] == names
