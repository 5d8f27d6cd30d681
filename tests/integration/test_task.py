"""Tasks: batches and outputs of any form, own steps, several optimizers; and what goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.experiment.run import execute
from app.runtime.errors import UserError
from tests.support.own_task import FEW
from tests.support.runs import job_for


def test_an_own_task_is_named_by_target_with_its_options(own_task: Path) -> None:
    goal = ("goal.metric=loss", "goal.mode=min", "~callbacks.plots")
    plain = execute(job_for("model=mlp", "debug=fast", *goal), own_task / "a")
    job = job_for(*FEW, "task=own", *goal)
    assert plain is not None
    assert execute(job, own_task / "b") == pytest.approx(2 * plain, rel=1e-6)


def test_an_own_task_that_breaks_is_named_before_the_first_epoch(own_task: Path) -> None:
    job = job_for(*FEW, "task._target_=own_task.Broken")
    with pytest.raises(UserError, match=r"task: Broken cannot take train data: KeyError: 'b'"):
        execute(job, own_task / "run")
    assert not (own_task / "run" / "epoch_details").exists()


def test_a_metric_of_another_kind_is_named_before_the_first_epoch(tmp_path: Path) -> None:
    node = "{_target_: torchmetrics.classification.BinaryAccuracy, validate_args: false}"
    job = job_for("model=mlp", "debug=fast", f"+metric.valid.mine={node}")
    with pytest.raises(UserError, match=r"metric\.valid\.mine: cannot take outputs"):
        execute(job, tmp_path)
    assert not (tmp_path / "epoch_details").exists()


def test_large_inputs_may_be_evaluated_window_by_window(tmp_path: Path) -> None:
    words = ("debug=fast", "experiment=shapes_patches", "data.image_size=32", "data.batch_size=4")
    patches = ("task.patches.size=[32,32]", "data.source.test.size=80")
    execute(job_for(*words, *patches), tmp_path)
    assert (tmp_path / "test_summary_table.csv").is_file()
