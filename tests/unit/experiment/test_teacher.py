"""The teacher of `task=distill`: how it is found, checked and used by a run."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from app.data.loaders import make_loader
from app.experiment.run import check_samples
from app.experiment.shorthand import expand
from app.experiment.teacher import mismatch_issues, read_teacher
from app.runtime.errors import UserError
from app.training.checkpoint.checkpoint import load_checkpoint
from app.training.distill import DistillTask
from tests.support import toy_training as toy
from tests.support.fitting import build_trainer, fit
from tests.support.runs import config_issues, job_for
from tests.support.teachers import DISTILL, SHORT, train_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained run."""
    return train_teacher(tmp_path_factory.mktemp("teacher"))


def test_teacher_has_the_weights_of_its_best_checkpoint(teacher: Path, tmp_path: Path) -> None:
    trainer, _ = build_trainer(job_for(*DISTILL, f"teacher={teacher}"), tmp_path)
    assert isinstance(trainer.task, DistillTask)
    assert trainer.task.teacher is not None
    expected = load_checkpoint(teacher).model
    torch.testing.assert_close(trainer.task.teacher.state_dict(), expected, rtol=0, atol=0)


def test_teacher_of_weight_0_changes_nothing(teacher: Path, tmp_path: Path) -> None:
    few = "trainer.max_epochs=1"
    alone, _ = fit(tmp_path / "a", *SHORT, "model=mlp", few)
    taught, _ = fit(tmp_path / "b", *DISTILL, f"teacher={teacher}", "task.alpha=0.0", few)
    weights = [trainer.task.model.state_dict() for trainer in (alone, taught)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.compile={backend: eager}", "trainer.accumulate_grad_batches=2"],
        ["trainer.precision=bf16-true", "trainer.channels_last=true", "model=lenet"],
    ],
)
def test_distilled_run_trains_with(overrides: list[str], teacher: Path, tmp_path: Path) -> None:
    job = (*DISTILL, f"teacher={teacher}", "trainer.max_epochs=1", *overrides)
    _, recorder = fit(tmp_path, *job)
    assert float(recorder.results[0].row["distillation_loss"]) > 0


# ---- errors before anything is written


def error_of(*overrides: str) -> str:
    """The only error in the configuration of a command line."""
    (issue,) = config_issues(*overrides)
    return issue


def test_teacher_that_is_missing_or_of_no_training_is_one_error(
    teacher: Path, tmp_path: Path
) -> None:
    assert error_of(*DISTILL) == (
        "teacher has no value: task=distill needs a run folder or a checkpoint file"
    )
    used = f"teacher={str(teacher)!r} is not used by app.training.supervised.SupervisedTask"
    assert used in error_of(*SHORT, "model=mlp", f"teacher={teacher}")
    assert f"teacher='{tmp_path}/no' does not exist; " in error_of(
        *DISTILL, f"teacher={tmp_path}/no"
    )
    assert "contains no checkpoint" in error_of(*DISTILL, f"teacher={tmp_path}")
    assert error_of(*DISTILL, "teacher=3").startswith("teacher=3: allowed: null, a run folder")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "net.pt")
    assert "truncated or not a checkpoint" in error_of(*DISTILL, f"teacher={tmp_path}/net.pt")
    toy.make_trainer(tmp_path / "python", toy.make_mlp(), 1).fit(make_loader(toy.DATA, 8))
    assert "was saved by a Trainer from Python" in error_of(*DISTILL, f"teacher={tmp_path}/python")


def test_teacher_of_other_data_is_an_error(teacher: Path) -> None:
    found, plain = read_teacher(teacher), job_for(*SHORT, "model=mlp").plain
    names = [*"abcdefghij"]

    def issues(ours: dict[str, Any], theirs: dict[str, Any] | None = None) -> str:
        """Return the issues of a training and a teacher whose data differ in some keys."""
        data = found.config["data"] | (theirs or {})
        other = replace(found, config=found.config | {"data": data})
        changed = plain | {"data": plain["data"] | ours}
        return "\n".join(map(str, mismatch_issues(other, changed)))

    assert not issues({})
    assert not issues({"class_names": names}, {"class_names": None})  # unknown
    assert not issues({"class_names": names}, {"class_names": names})
    assert "trained with 10 classes; here data.num_classes=2; they must" in issues(
        {"num_classes": 2}
    )
    assert "data.num_classes is null" in issues({"num_classes": None})
    assert "trained with 'a' as class 0; here it is 'b'; names and order" in issues(
        {"class_names": ["b", "a", *names[2:]]}, {"class_names": names}
    )
    assert f"teacher='{found.file}' was trained with data.normalize={{'mean'" in issues(
        {"normalize": None}
    )


def test_teacher_is_tried_with_two_samples(teacher: Path) -> None:
    few = (*DISTILL, f"teacher={teacher}", "mode=check")
    check_samples(job_for(*few))
    with pytest.raises(UserError, match=r"^teacher: LeNet cannot take .*\[2, 3, 28, 28\]"):
        check_samples(job_for(*few, "data.channels=3"))


def test_latest_teacher_is_the_run_that_saved_last(tmp_path: Path, teacher: Path) -> None:
    shutil.copytree(teacher, tmp_path / "outputs" / "day" / "time_run")
    expanded = expand(["teacher=latest", f"output={tmp_path}/outputs"], {})
    assert expanded[0] == f"teacher='{tmp_path}/outputs/day/time_run'"
