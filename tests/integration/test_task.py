"""Tasks chosen by configuration, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.experiment.run import execute
from app.runtime.errors import UserError
from tests.support.own_task import OWN_TASK_ARGUMENTS, write_own_task
from tests.support.runs import job_for


@pytest.fixture
def own_task(tmp_cwd: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_own_task(tmp_cwd, monkeypatch)


def test_own_task_with_options_is_used(own_task: Path) -> None:
    goal = ("goal.metric=loss", "goal.mode=min")
    plain = execute(job_for("model=mlp", "debug=fast", "~callbacks.plots", *goal), own_task / "a")
    job = job_for(*OWN_TASK_ARGUMENTS, "task=own", *goal)
    assert plain is not None
    assert execute(job, own_task / "b") == pytest.approx(2 * plain, rel=1e-6)


def test_own_task_that_raises_fails_before_the_first_epoch(own_task: Path) -> None:
    job = job_for(*OWN_TASK_ARGUMENTS, "task._target_=own_task.BrokenTask")
    with pytest.raises(
        UserError, match=r"task: BrokenTask cannot process the train data: KeyError: 'b'"
    ):
        execute(job, own_task / "run")
    assert not (own_task / "run" / "epoch_details").exists()


def test_metric_that_does_not_fit_fails_before_the_first_epoch(tmp_path: Path) -> None:
    node = "{_target_: torchmetrics.classification.BinaryAccuracy, validate_args: false}"
    job = job_for("model=mlp", "debug=fast", f"+metric.valid.mine={node}")
    with pytest.raises(UserError, match=r"metric\.valid\.mine: cannot take outputs"):
        execute(job, tmp_path)
    assert not (tmp_path / "epoch_details").exists()


def test_task_patches_evaluates_large_inputs_by_windows(tmp_path: Path) -> None:
    overrides = (
        "debug=fast",
        "~callbacks.plots",
        "experiment=shapes_patches",
        "data.image_size=32",
        "data.batch_size=4",
    )
    patches = ("task.patches.size=[32,32]", "data.source.test.size=80")
    execute(job_for(*overrides, *patches), tmp_path)
    assert (tmp_path / "test_summary_table.csv").is_file()
